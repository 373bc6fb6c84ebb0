"""Draw what the shipped energy does to an attack: one image of each class.

The images are the first of each class that the natural classifier knows, not the prettiest. The
attack is on that classifier alone; one that goes through the chain does better, see the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import ROOT, Options, Result, main
from torch import Tensor

from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.data import dataset, load_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.reporting.figures.pictures import PLAIN, RIGHT, WRONG, pixels
from ebm_defense.noise import chain_keys
from ebm_defense.storage.files import atomic
from ebm_defense.storage.weights import load_defense

PICTURE = ROOT / "docs" / "defended.png"


class Line(NamedTuple):
    """A line of the picture: its name, its images, and the class named under each, if any."""

    name: str
    images: Tensor
    said: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Picture(Options):
    """Draw original, attacked, purified and difference for an image of each class."""

    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    data: str = "fashion-mnist"
    """Data set, of which test images are shown."""
    eps: float = 0.1
    """Largest Linf perturbation, in [0, 1] units."""
    steps: int = 40
    """Steps of PGD, each of eps/10, on cross-entropy."""
    picture: Path = PICTURE
    """Where the picture goes."""

    def run(self) -> Result:
        """Attack, purify, draw."""
        defense = load_defense(self.defense, seed=self.seed).requires_grad_(False)
        images, labels = self._chosen(defense)
        threat = ThreatModel(eps=self.eps)
        attack = PGD(threat=threat, steps=self.steps, step_size=self.eps / 10, replicates=1)
        attacked = attack(defense.classifier, images, labels, seed=self.seed)
        lines = self._lines(defense, images, attacked)
        draw(lines, labels, dataset(self.data).classes, self.picture)
        return Result("picture", self._caption(lines, labels), len(images))

    def _chosen(self, defense: PurifiedClassifier) -> tuple[Tensor, Tensor]:
        """Return the first image of each class that the bare classifier knows."""
        images, labels = load_data(self.data, "test", 200)
        known = defense.classifier(images).argmax(-1) == labels
        first = [int(((labels == c) & known).nonzero()[0]) for c in labels.unique()]
        return images[first], labels[first]

    def _lines(self, defense: PurifiedClassifier, images: Tensor, attacked: Tensor) -> list[Line]:
        bare, keys = defense.classifier, chain_keys(self.seed, "picture", range(len(images)), [0])
        purified = defense.purify_replicates(attacked, keys)[0]
        onto_grey = 0.5 + (purified - attacked) / (4.0 * self.eps)
        return [
            Line("original", images, bare(images).argmax(-1)),
            Line("attacked", attacked, bare(attacked).argmax(-1)),
            Line("purified", purified, defense(attacked).argmax(-1)),
            Line("difference", onto_grey, None),
        ]

    def _caption(self, lines: Sequence[Line], labels: Tensor) -> str:
        right = {line.name: int((line.said == labels).sum()) for line in lines[:3]}
        return (
            "The first test image of each class that the bare natural classifier knows; attacked "
            f"by PGD-{self.steps} on that classifier alone (Linf {self.eps:g}, steps of "
            f"{self.eps / 10:g}, cross-entropy); once purified by the shipped energy; and what "
            "purifying changed, grey where nothing. Under each the answer, red where wrong: of "
            "the bare classifier, and under the purified image of the defense to the attacked one "
            f"(mean logits of 16 draws). Right are {right['original']} of {len(labels)} originals "
            f"and {right['attacked']} attacked images bare, and {right['purified']} attacked "
            "images defended. An attack through the chain does better: see the table. Seed "
            f"{self.seed}."
        )


def draw(lines: Sequence[Line], labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw the lines, the right answers green and the wrong ones red."""
    from matplotlib.figure import Figure

    columns = len(labels)
    figure = Figure(figsize=(1.05 * columns + 1.0, 1.3 * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, row in zip(lines, axes, strict=True):
        for i, axis in enumerate(row):
            axis.imshow(pixels(line.images[i]), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(PLAIN)
            if line.said is not None:
                _answer(axis, int(line.said[i]), int(labels[i]), classes)
        side = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
        row[0].set_ylabel(line.name, fontsize=9, color=PLAIN, **side)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, transparent=True)


def _answer(axis: Any, said: int, label: int, classes: Sequence[str]) -> None:
    colour = RIGHT if said == label else WRONG
    axis.set_xlabel(classes[said], fontsize=8, color=colour, labelpad=2)


if __name__ == "__main__":
    sys.exit(main(Picture))
