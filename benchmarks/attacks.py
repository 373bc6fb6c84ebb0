"""Which attack is strongest: every gradient, loss and optimiser on one defense, in one table.

    python benchmarks/attacks.py                      # more than an hour on one CPU core
    python benchmarks/attacks.py --defense fashion-mnist-smooth --gradients full surrogate
    python benchmarks/attacks.py --only pgd square --images 32 16 8 --split val
    python benchmarks/attacks.py --also advgan:runs/advgan "pgd(steps=100, replicates=16)"

Each attack is a run of its own, judged on the same number of fresh draws, so a run cut short goes
on where it stopped. The dearer an attack, the fewer images it gets: always the first ones of the
same sample, so that any two rows share the images of the smaller. Beside robust accuracy stand
that of BPDA (PGD on cross-entropy) on the same images, the worst image by image of this attack and
all above it on the images that all rows share, and what it cost, as spent: a broken image costs
no more.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import ThreatModel, make_attack
from ebm_defense.data import Images, dataset
from ebm_defense.eval import Report, evaluate
from ebm_defense.eval.judging.statistics import Share, share
from ebm_defense.eval.runner import attack_column
from ebm_defense.files import writable_folder, write_text
from ebm_defense.runtime.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
CLIMBS = ("pgd", "apgd")
LOSSES = ("ce", "dlr")
TIERS = ("cheap", "gradient", "dear")
SMOOTHED = [
    "smoothed(width=0.3, stride=4, precision='bf16')",
    "smoothed(width=0.3, stride=4, perturbation=0.02, precision='bf16')",
    "surrogate(steps=10, through=smoothed(width=0.3, stride=1, precision='bf16'))",
]
"""The gradients that go through a LeakyReLU energy; the full one is bpda's there."""


class Contest(NamedTuple):
    """One attack by its name and settings, and the tier that says how many images it gets."""

    spec: str
    tier: str


class Outcome(NamedTuple):
    """What an attack left standing of its images, bool `[b]`, and its cost over all of them."""

    stands: Tensor
    steps: float
    seconds: float


def contests(given: argparse.Namespace) -> list[Contest]:
    """Return the attacks, cheapest first."""
    best = called(given.gradients[0])
    spent = f"steps={given.steps}, replicates={given.replicates}"
    both = [
        Contest(f"{climb}({spent}, loss={loss}(), gradient={called(gradient)})", tier)
        for gradient, tier in [("bpda", "cheap"), *((g, "gradient") for g in given.gradients)]
        for loss in LOSSES
        for climb in CLIMBS
    ]
    return [
        *both[:1],
        Contest(f"transfer(steps=40, replicates={given.replicates})", "cheap"),
        *both[1:],
        Contest(f"diffhammer(steps={given.steps}, restarts=1, gradient={best})", "gradient"),
        Contest(
            f"apgd-t(targets=3, steps=30, replicates={given.replicates}, gradient={best})", "dear"
        ),
        Contest("square(steps=500, replicates=4, rescale=True)", "dear"),
        Contest("spsa(steps=20, gradient=score-free(samples=64))", "dear"),
        *(Contest(also, "gradient") for also in given.also),
    ]


def called(part: str) -> str:
    """Return a part's name as it stands within another's settings."""
    return part if part.endswith(")") else f"{part}()"


def measure(
    defense: PurifiedClassifier, data: Images, contest: Contest, given: argparse.Namespace
) -> Outcome:
    """Run one attack, or read it from its finished shards."""
    attack = make_attack(contest.spec, threat=ThreatModel(eps=dataset(given.data).eps))
    name = re.sub(r"[^\w.]+", "-", contest.spec).strip("-")
    report: Report = evaluate(
        defense,
        *data,
        attacks=[attack],
        judge_replicates=given.judge_replicates,
        seed=given.seed,
        out=given.out / f"{given.defense}-{given.split}-{len(data.labels)}-{name}",
    )
    stands = report.records[f"{attack_column(0, attack)}: stands"].to_numpy()
    steps, seconds = (cost.get(attack.name, 0.0) for cost in (report.chain_steps, report.seconds))
    return Outcome(torch.tensor(stands).bool(), steps, seconds)


def percent(found: Share) -> str:
    """Return a share as a percentage."""
    return f"{100 * found.value:.1f}"


def of(stands: Tensor) -> Share:
    """Return the share of images that stand, with its interval."""
    return share(int(stands.sum()), len(stands))


def line(spec: str, outcome: Outcome, bpda: Tensor, worst: Tensor) -> dict[str, Any]:
    """Return an attack's row; `worst` is lowered to what stands under all so far."""
    count = len(outcome.stands)
    worst &= outcome.stands[: len(worst)]
    found = of(outcome.stands)
    return {
        "attack": spec,
        "images": count,
        "robust %": percent(found),
        "95% interval": f"{100 * found.low:.1f} to {100 * found.high:.1f}",
        "BPDA on these %": percent(of(bpda[:count])),
        f"worst so far of {len(worst)} %": percent(of(worst)),
        "chain-steps an image": f"{outcome.steps / count:,.0f}",
        "seconds an image": f"{outcome.seconds / count:.1f}",
    }


def main() -> int:
    """Measure, print a line as soon as it is there, and keep the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--defense", default="fashion-mnist")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--images", type=int, nargs=3, default=[200, 64, 32], metavar="N", help=", ".join(TIERS)
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--judge-replicates", type=int, default=64)
    parser.add_argument(
        "--gradients",
        nargs="+",
        default=SMOOTHED,
        help="beside bpda; DiffHammer and targeted APGD take the first",
    )
    parser.add_argument(
        "--also",
        nargs="*",
        default=[],
        metavar="ATTACK",
        help="more attacks by name, on as many images as those by gradient",
    )
    parser.add_argument("--only", nargs="*", help="attacks whose names begin so, after the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"))
    given = parser.parse_args()
    keep_freed_memory()
    writable_folder(given.out)
    lines = compete(given)
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    print(f"\n{table}\n\n{caption(given)}")
    name = f"attacks-{given.defense}-{given.split}.md"
    write_text(writable_folder(RESULTS) / name, f"{table}\n\n{caption(given)}\n")
    return 0


def compete(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the attacks that were asked for, and return their rows."""
    images = dict(zip(TIERS, given.images, strict=True))
    data = load_data(given.data, given.split, max(given.images))
    defense = load_defense(given.defense, seed=0)
    first, *others = contests(given)
    wanted = [first, *(c for c in others if c.spec.startswith(tuple(given.only or [""])))]
    worst = torch.ones(min(given.images), dtype=torch.bool)
    bpda, lines = worst, []
    for contest in wanted:
        some = Images(*(part[: images[contest.tier]] for part in data))
        outcome = measure(defense, some, contest, given)
        bpda = outcome.stands if contest is first else bpda
        lines.append(line(contest.spec, outcome, bpda, worst))
        print(*lines[-1].values(), sep=" | ", flush=True)
    return lines


def caption(given: argparse.Namespace) -> str:
    """Return what all rows share."""
    steps = load_defense(given.defense).purifier.chain_steps
    return (
        f"{given.defense}, {given.split} images, Linf {dataset(given.data).eps:g}, steps and "
        f"attack replicates as each row says, {steps} Langevin steps, judged on "
        f"{given.judge_replicates} fresh draws (two-stage rule), 95% Wilson intervals, seed "
        f"{given.seed}. `python benchmarks/attacks.py {shlex.join(sys.argv[1:])}`"
    )


if __name__ == "__main__":
    sys.exit(main())
