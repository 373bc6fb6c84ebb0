"""Purifiers of every kind before one natural classifier, side by side.

    python benchmarks/purifier_family.py --purifiers none gaussian:0.15 latent:runs/prior/purifier

Each is evaluated by protocol `standard` in a run folder of its own, all on the same images: every
attack that takes a gradient goes through the purifier wherever a gradient does. The classifier is
the one that a defense keeps as undefended; nothing was trained together.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Options, Result, main, table

from ebm_defense.attacks.gradients.registry import fitting_gradient
from ebm_defense.commands.options.shared import make_purifier
from ebm_defense.data import load_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval import Report, evaluate, get_protocol
from ebm_defense.eval.reporting.table import interval, percent
from ebm_defense.noise import chain_keys
from ebm_defense.purifiers.registry import caption
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class PurifierFamily(Options):
    """Evaluate purifiers before one classifier by protocol standard."""

    purifiers: tuple[str, ...] = ("none",)
    """Each as `evaluate --purifier` takes it."""
    defense: str = "fashion-mnist"
    """A shipped defense or a folder, whose undefended classifier stands behind the purifiers."""
    data: str = "fashion-mnist"
    """Data set."""
    images: int = 100
    """How many test images."""
    eps: float = 0.1
    """Largest Linf perturbation, in [0, 1] units."""
    steps: int = 20
    """Gradient steps of each attack; Square has 50 queries for each."""
    replicates: int = 2
    """Attack replicates."""
    judge_replicates: int = 16
    """Fresh draws of a judgement, and of the selection of what is judged."""
    deployed: int = 16
    """Replicates that a prediction averages."""

    def run(self) -> Result:
        """Evaluate one after another."""
        shown = table(self._rows())
        return Result(
            "purifier-family",
            f"{shown}\n\n{self._caption()}",
            self.images * len(self.purifiers),
        )

    def _rows(self) -> Iterator[dict[str, str]]:
        images, labels = load_data(self.data, "test", self.images)
        protocol = get_protocol(
            "standard",
            eps=self.eps,
            steps=self.steps,
            replicates=self.replicates,
            judge_replicates=self.judge_replicates,
            selection_replicates=self.judge_replicates,
        )
        classifier = load_defense(self.defense).undefended.requires_grad_(False)
        for spec in self.purifiers:
            defense = PurifiedClassifier(
                classifier, make_purifier(spec), self.deployed, verdict_precision="fp32"
            )
            run = self.out / re.sub(r"\W+", "-", spec).strip("-")
            report = evaluate(defense, images, labels, protocol, seed=self.seed, out=run)
            yield row(report, defense, images)

    def _caption(self) -> str:
        return (
            f"Accuracy in % and its 95% Wilson interval, {self.images} test images of {self.data}, "
            f"Linf {self.eps:g}, before the classifier that {Path(self.defense).name} keeps as "
            f"undefended; a prediction averages the logits of {self.deployed} draws. Strongest: "
            f"what stands under all attacks of protocol standard, reduced to {self.steps} steps of "
            f"each, {50 * self.steps} queries of Square and {self.replicates} attack replicates; "
            f"the image to judge is selected on {self.judge_replicates} draws and judged once on "
            f"{self.judge_replicates} others. The attack named leaves least by itself. Steps: of "
            "the chain, of one prediction. Seconds: of one image's prediction on this machine, "
            f"which others used too. Verdicts in fp32, seed {self.seed}."
        )


def row(report: Report, defense: PurifiedClassifier, images: torch.Tensor) -> dict[str, str]:
    """Return what is shown of a purifier."""
    clean, stands = report.share(report.natural_column()), report.robust()
    alone = [report.robust(n).value for n in range(len(report.protocol.attacks))]
    replicates = defense.replicates if defense.purifier.stochastic else 1
    return {
        "purifier": caption(defense.purifier.record(images[:1])),
        "clean": f"{percent(clean.value)} ({interval(clean)})",
        "strongest": f"{percent(stands.value)} ({interval(stands)})",
        "attack": report.protocol.attacks[alone.index(min(alone))].name,
        "gradient": fitting_gradient(defense, images).name,
        "steps": f"{replicates * defense.purifier.chain_steps:,}",
        "seconds": f"{seconds(defense, images[:16], replicates):.3f}",
    }


def seconds(defense: PurifiedClassifier, images: torch.Tensor, replicates: int) -> float:
    """Return how long one image's prediction takes, in a batch of these."""
    keys = chain_keys(0, "timing", range(len(images)), range(replicates))
    with torch.no_grad():
        defense.replicate_logits(images[:1], keys[:, :1])
        begun = time.perf_counter()
        defense.replicate_logits(images, keys)
    return (time.perf_counter() - begun) / len(images)


if __name__ == "__main__":
    sys.exit(main(PurifierFamily))
