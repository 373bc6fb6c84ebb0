"""What judging every look does to borderline images, where the truth is known.

    python benchmarks/any_look.py            # a minute on one CPU core

Langevin dynamics on a quadratic energy, before a linear classifier: a prediction, the mean of R
replicates, is right with probability Φ(m·√R/s), with m the mean and s the standard deviation of
one replicate's margin, and the worst attack lowers m by a known amount. So accuracy is known for
every image, attacked or not. PGD is at the worst image after one step and stays there; all that
more looks change is how often an image is tried. The figure goes to docs/any-look.svg.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import ROOT, Options, Result, main, table
from scipy.stats import norm
from torch import Tensor, nn

from ebm_defense import LangevinPurifier, PurifiedClassifier, QuadraticEnergy
from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.eval import Protocol, TwoStage, evaluate
from ebm_defense.eval.reporting.figures.drawing import COLOURS
from ebm_defense.storage.files import atomic

SHAPE, STEPS, LEFT, EPS = (1, 2, 2), 3, 0.9, 0.06
PREDICTED, PREDICTIONS = 16, 9
"""Replicates of a prediction, and how many predictions of each image are judged."""
POINTS = (1, 5, 20, 50, 100)


class Linear(nn.Module):
    """Logits (−g/2, g/2) of the margin g = Σᵢ(xᵢ − 1/2)."""

    def forward(self, x: Tensor) -> Tensor:
        half = (x.flatten(1) - 0.5).sum(1) / 2.0
        return torch.stack([-half, half], dim=1)


@dataclass(frozen=True, kw_only=True)
class AnyLook(Options):
    """Draw reported accuracy over the number of looks, by both rules, beside the truth."""

    images: int = 400
    """How many, two thirds of them within two standard errors of a boundary."""
    figure: Path = ROOT / "docs" / "any-look.svg"
    """Where the figure goes."""

    def run(self) -> Result:
        """Judge every look, and one selected image of each, for ever more looks."""
        tried = evaluate(defense(), *self._data(), self._published(max(POINTS)), seed=self.seed)
        found = [self._selected(looks) for looks in POINTS]
        draw(self.figure, tried.curve(), found, self._truth())
        text = f"{table(self._rows(tried.curve(), found))}\n\n{self._caption()}"
        return Result("any-look", text, self.images * len(POINTS))

    def _margins(self) -> Tensor:
        """Mean margins, positive where right: about both boundaries, and everywhere."""
        third, near = self.images // 3, damage() / 2.0
        rest = self.images - 2 * third
        near_clean, near_attacked = (x + torch.linspace(-near, near, third) for x in (0, damage()))
        return torch.cat([near_clean, near_attacked, damage() * torch.linspace(-1.0, 3.0, rest)])

    def _data(self) -> tuple[Tensor, Tensor]:
        labels = torch.arange(self.images) % 2
        signed = self._margins() * (2.0 * labels - 1.0)
        apart = signed / LEFT**STEPS / torch.Size(SHAPE).numel()
        return 0.5 + apart.view(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous(), labels

    def _truth(self) -> float:
        right = (self._margins() - damage()) * PREDICTED**0.5 / spread()
        return float(norm.cdf(right.double().numpy()).mean())

    def _published(self, looks: int) -> Protocol:
        return Protocol(
            name="any look",
            attacks=(attack(looks),),
            judge_replicates=PREDICTED,
            verdict=TwoStage(),
            looks="every",
        )

    def _selected(self, looks: int) -> float:
        draws = PREDICTED * PREDICTIONS
        report = evaluate(
            defense(),
            *self._data(),
            attacks=[attack(looks)],
            judge_replicates=draws,
            seed=self.seed,
        )
        return report.robust().value

    def _rows(self, tried: pd.Series[float], found: list[float]) -> Iterator[dict[str, Any]]:
        for looks, value in zip(POINTS, found, strict=True):
            yield {
                "looks": looks,
                "any look %": f"{100 * tried[looks]:.1f}",
                "selected, judged once %": f"{100 * value:.1f}",
                "truth, worst attack %": f"{100 * self._truth():.1f}",
            }

    def _caption(self) -> str:
        return (
            f"{self.images} images, {attack(max(POINTS)).threat}, PGD from the image itself, "
            f"{PREDICTED} replicates a look and a prediction, {STEPS} Langevin steps; judged on "
            f"{PREDICTED} fresh replicates a suspected look (any look), or on "
            f"{PREDICTED * PREDICTIONS} of one selected image (judged once), seed {self.seed}."
        )


def attack(looks: int) -> PGD:
    """Return PGD that looks at the image itself and then so many times at the worst one."""
    return PGD(
        threat=ThreatModel(eps=EPS),
        steps=looks,
        step_size=EPS,
        replicates=PREDICTED,
        random_start=False,
    )


def damage() -> float:
    """Return how far the worst attack lowers the mean margin."""
    return EPS * torch.Size(SHAPE).numel() * LEFT**STEPS


def spread() -> float:
    """Return s: two standard errors of a prediction are half the damage."""
    return damage() * PREDICTED**0.5 / 4.0


def defense() -> PurifiedClassifier:
    """Return the defense: U = (1 − a)‖x‖²/2 at T = ε²/2 leaves a of the distance to 0 a step."""
    gathered = sum(LEFT ** (2 * j) for j in range(STEPS))
    pixels = torch.Size(SHAPE).numel()
    size = 2.0 * spread() / (pixels * gathered) ** 0.5
    curvature = torch.full((pixels,), 1.0 - LEFT)
    purifier = LangevinPurifier(
        QuadraticEnergy(torch.zeros(SHAPE), curvature),
        steps=STEPS,
        step_size=size,
        temperature=size**2 / 2.0,
        precision="fp32",
    )
    return PurifiedClassifier(Linear(), purifier, PREDICTED, max_chains=100_000)


def draw(file: Path, tried: pd.Series[float], found: list[float], truth: float) -> None:
    """Draw accuracy over looks by both rules, and the truth as a line."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    # The first look is at the image itself.
    axis.plot(
        tried.index[1:],
        100 * tried[1:],
        color=COLOURS[1],
        label="any look: broken once, broken for good",
    )
    axis.plot(
        POINTS, 100 * np.array(found), "o", color=COLOURS[0], label="selected, then judged once"
    )
    axis.axhline(100 * truth, color="0.3", linestyle="--", label="the truth under the worst attack")
    axis.set(xscale="log", xlabel="looks", ylabel="reported robust accuracy %", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    # The same picture is the same file.
    with mpl.rc_context({"svg.hashsalt": "ebm-defense"}), atomic(file) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main(AnyLook))
