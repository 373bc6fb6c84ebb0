"""Which gradient breaks a piecewise linear energy: smoothed ones beside BPDA, at equal budget.

    python benchmarks/smoothing.py                                  # validation images
    python benchmarks/smoothing.py --split test --images 64 --gradients bpda 'smoothed(width=1)'

Every gradient drives the same PGD from the same start on the same images, with the same replicates
and steps, and is judged on the same number of fresh draws. Beside robust accuracy stand the cost,
in chain-steps an image and in seconds, and the mean cosine with BPDA's gradient at the originals.
A run cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import PGD, CrossEntropy, Gradient, Identity, ThreatModel, make_gradient
from ebm_defense.data import Images, dataset
from ebm_defense.eval import evaluate
from ebm_defense.files import writable_folder, write_text
from ebm_defense.noise import chain_keys
from ebm_defense.runtime.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
STEPS_ACROSS_EPS = 4


def gradients(given: argparse.Namespace) -> dict[str, Gradient]:
    """Return the gradients to compare, by their specs."""
    grid = [
        f"smoothed(width={width:g}, stride={stride}, precision={given.precision!r})"
        for stride in given.strides
        for width in given.widths
    ]
    return {spec: make_gradient(spec) for spec in given.gradients or ["bpda", *grid]}


def cosine(
    defense: PurifiedClassifier, data: Images, gradient: Gradient, given: argparse.Namespace
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
    given: argparse.Namespace,
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
    out = given.out / f"{given.defense}-{given.split}-{len(data.labels)}-{name}"
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
        "robust %": f"{100 * robust.value:.1f}",
        "95% interval": f"{100 * robust.low:.1f} to {100 * robust.high:.1f}",
        "cosine with BPDA": f"{cosine(defense, data, gradient, given):.2f}",
        "chain-steps an image": f"{attack.chain_steps(defense):,}",
        "seconds": "earlier" if seconds is None else f"{seconds:.0f}",
    }


def main() -> int:
    """Compare, print a line as soon as it is there, and keep the table in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defense", default="fashion-mnist")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--eps", type=float)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--replicates", type=int, default=4)
    parser.add_argument("--judge-replicates", type=int, default=32)
    parser.add_argument("--gradients", nargs="*", help="specs, instead of the grid")
    parser.add_argument("--widths", type=float, nargs="*", default=[0.1, 0.3, 1.0])
    parser.add_argument("--strides", type=int, nargs="*", default=[4, 1])
    parser.add_argument("--precision", default="bf16", help="of the products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/smoothing"))
    given = parser.parse_args()
    keep_freed_memory()
    writable_folder(given.out)
    data = load_data(given.data, given.split, given.images)
    defense = load_defense(given.defense, seed=0)
    lines: list[dict[str, str]] = []
    for spec, gradient in gradients(given).items():
        lines.append(row(defense, data, spec, gradient, given))
        print(*lines[-1].values(), sep=" | ", flush=True)
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    text = f"{table}\n\n{caption(given)}\n"
    print(f"\n{text}")
    write_text(writable_folder(RESULTS) / f"smoothing-{given.defense}-{given.split}.md", text)
    return 0


def caption(given: argparse.Namespace) -> str:
    """Return what all rows share."""
    eps = dataset(given.data).eps if given.eps is None else given.eps
    steps = load_defense(given.defense).purifier.chain_steps
    return (
        f"{given.defense}, {given.images} {given.split} images, PGD on the cross-entropy, Linf "
        f"{eps:g}, {given.steps} steps of {eps / STEPS_ACROSS_EPS:g}, random start, "
        f"{given.replicates} replicates a step, {steps} Langevin steps, judged on "
        f"{given.judge_replicates} fresh draws (two-stage rule), 95% Wilson intervals, seed "
        f"{given.seed}."
    )


if __name__ == "__main__":
    sys.exit(main())
