"""Which gradient breaks a piecewise linear energy: smoothed ones beside BPDA, at equal budget.

    python benchmarks/smoothing.py                                  # validation images
    python benchmarks/smoothing.py --split test --images 64 --gradients bpda 'smoothed(width=1)'

Every gradient drives the same PGD from the same start on the same images, with the same replicates
and steps, and is judged on the same number of fresh draws. Beside robust accuracy stand the cost,
in chain-steps an image and in seconds, and the mean cosine with BPDA's gradient at the originals.
A run cut short goes on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from common import OnImages, Result, accuracy, main, table

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import PGD, CrossEntropy, Gradient, Identity, ThreatModel, make_gradient
from ebm_defense.data import Images, dataset
from ebm_defense.eval import evaluate
from ebm_defense.noise import chain_keys

STEPS_ACROSS_EPS = 4


def gradients(given: Smoothing) -> dict[str, Gradient]:
    """Return the gradients to compare, by their specs."""
    grid = [
        f"smoothed(width={width:g}, stride={stride}, precision={given.precision!r})"
        for stride in given.strides
        for width in given.widths
    ]
    return {spec: make_gradient(spec) for spec in given.gradients or ["bpda", *grid]}


def cosine(
    defense: PurifiedClassifier, data: Images, gradient: Gradient, given: Smoothing
) -> float:
    """Return the mean cosine over images between a gradient and BPDA's, on the same noise."""
    keys = chain_keys(given.seed, "cosine", range(len(data.labels)), range(given.replicates))
    found, bpda = (
        g(defense, *data, keys, CrossEntropy()).gradient.flatten(1) for g in (gradient, Identity())
    )
    return float(torch.cosine_similarity(found, bpda).mean())


def row(
    defense: PurifiedClassifier,
    data: Images,
    spec: str,
    gradient: Gradient,
    given: Smoothing,
) -> dict[str, str]:
    """Attack with one gradient, or read what an earlier run found, and return its line."""
    eps = dataset(given.data).eps if given.eps is None else given.eps
    attack = PGD(
        threat=ThreatModel(eps=eps),
        steps=given.steps,
        step_size=eps / STEPS_ACROSS_EPS,
        replicates=given.replicates,
        gradient=gradient,
    )
    name = spec.replace(":", "-").replace(",", "-").replace("=", "")
    out = given.out / f"smoothing-{given.defense}-{given.split}-{len(data.labels)}-{name}"
    report = evaluate(
        defense,
        *data,
        attacks=[attack],
        judge_replicates=given.judge_replicates,
        seed=given.seed,
        out=out,
    )
    robust, seconds = report.robust(), report.seconds.get(attack.name)
    return {
        "gradient": spec,
        **accuracy(robust),
        "cosine with BPDA": f"{cosine(defense, data, gradient, given):.2f}",
        "chain-steps an image": f"{attack.chain_steps(defense):,}",
        "seconds": "earlier" if seconds is None else f"{seconds:.0f}",
    }


def caption(given: Smoothing) -> str:
    """Return what all rows share."""
    eps = dataset(given.data).eps if given.eps is None else given.eps
    steps = load_defense(given.defense).purifier.chain_steps
    return (
        f"{given.defense}, {given.images} {given.split} images, PGD on the cross-entropy, Linf "
        f"{eps:g}, {given.steps} steps of {eps / STEPS_ACROSS_EPS:g}, random start, "
        f"{given.replicates} replicates a step, {steps} Langevin steps, judged on "
        f"{given.judge_replicates} fresh draws of one selected image each, as deployed, 95% Wilson "
        f"intervals, seed {given.seed}."
    )


@dataclass(frozen=True, kw_only=True)
class Smoothing(OnImages):
    """Set smoothed gradients beside BPDA on a piecewise linear energy, at equal budget."""

    split: str = "val"
    """train, val or test."""
    images: int = 24
    """How many images, a stratified sample."""
    eps: float | None = None
    """In [0, 1] pixel units; the data set's custom if not given."""
    steps: int = 10
    """Attack steps."""
    replicates: int = 4
    """Attack replicates."""
    judge_replicates: int = 32
    """Fresh replicates of a verification."""
    gradients: tuple[str, ...] = ()
    """Gradients by name, instead of the grid."""
    widths: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Of the grid."""
    strides: tuple[int, ...] = (4, 1)
    """Of the grid."""
    precision: str = "bf16"
    """Of the products."""

    def run(self) -> Result:
        """Attack with each gradient, or read what an earlier run found."""
        data = load_data(self.data, self.split, self.images)
        defense = load_defense(self.defense, seed=0)
        chosen = gradients(self)
        rows = (row(defense, data, spec, g, self) for spec, g in chosen.items())
        text = f"{table(rows)}\n\n{caption(self)}"
        name = f"smoothing-{self.defense}-{self.split}"
        return Result(name, text, self.images * len(chosen))


if __name__ == "__main__":
    sys.exit(main(Smoothing))
