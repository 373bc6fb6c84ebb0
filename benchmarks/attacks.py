"""Which attack is strongest: every gradient, loss and optimiser on one defense, in one table.

    python benchmarks/attacks.py                                     # hours on two CPU cores
    python benchmarks/attacks.py --defense fashion-mnist-smooth --gradient full
    python benchmarks/attacks.py --only pgd square --images 64 --split val

Each attack is a run of its own on the same images, judged on the same number of fresh draws, so
a run cut short goes on where it stopped. Beside robust accuracy stand what it cost, in chain-steps
(as spent: a broken image costs no more) and in seconds, and the worst of all attacks so far.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ebm_defense import PurifiedClassifier, load_data, load_defense
from ebm_defense.attacks import Attack, ThreatModel, make_attack
from ebm_defense.data import Images, dataset
from ebm_defense.eval import Report, evaluate
from ebm_defense.eval.runner import attack_column
from ebm_defense.eval.statistics import share
from ebm_defense.files import writable_folder, write_text
from ebm_defense.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
CLIMBS = ("pgd", "apgd")
LOSSES = ("ce", "dlr")


def specs(given: argparse.Namespace) -> list[str]:
    """Return the attacks by their names and settings, cheapest first."""
    both = [
        f"{climb}(steps={given.steps}, replicates={given.replicates}, loss='{loss}', "
        f'gradient="{gradient}")'
        for gradient in ("bpda", given.gradient)
        for climb in CLIMBS
        for loss in LOSSES
    ]
    g = given.gradient
    return [
        f"transfer(steps=40, replicates={given.replicates})",
        *both,
        f'diffhammer(steps={given.steps}, restarts=1, gradient="{g}")',
        f'apgd-t(targets=3, steps=30, replicates={given.replicates}, gradient="{g}")',
        "square(steps=500, replicates=4, rescale=True)",
        "spsa(steps=20, gradient='score-free(samples=64)')",
    ]


def measure(
    defense: PurifiedClassifier, data: Images, text: str, given: argparse.Namespace
) -> tuple[Attack, Report]:
    """Run one attack, or read it from its finished shards."""
    eps = dataset(given.data).eps
    attack = make_attack(text, threat=ThreatModel(eps=eps))
    name = re.sub(r"[^a-z0-9.]+", "-", text).strip("-")
    out = given.out / f"{given.defense}-{given.split}-{len(data.labels)}-{name}"
    judged = given.judge_replicates
    report = evaluate(
        defense, *data, attacks=[attack], judge_replicates=judged, seed=given.seed, out=out
    )
    return attack, report


def line(attack: Attack, report: Report, text: str, worst: torch.Tensor) -> dict[str, Any]:
    """Return an attack's row; `worst` is lowered to what stands under all so far."""
    column = attack_column(0, attack)
    worst &= torch.tensor(report.records[f"{column}: stands"].to_numpy()).bool()
    found, left = report.robust(), share(int(worst.sum()), len(worst))
    spent, seconds = report.chain_steps.get(attack.name), report.seconds.get(attack.name)
    return {
        "attack": text,
        "robust %": f"{100 * found.value:.1f}",
        "95% interval": f"{100 * found.low:.1f} to {100 * found.high:.1f}",
        "worst so far %": f"{100 * left.value:.1f}",
        "chain-steps an image": "earlier" if spent is None else f"{spent / len(worst):,.0f}",
        "seconds": "earlier" if seconds is None else f"{seconds:.0f}",
    }


def main() -> int:
    """Measure, print a line as soon as it is there, and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--defense", default="fashion-mnist")
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--judge-replicates", type=int, default=64)
    parser.add_argument("--gradient", default="smoothed", help="beside bpda: full, smoothed(…)")
    parser.add_argument("--only", nargs="*", help="attacks whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"))
    given = parser.parse_args()
    keep_freed_memory()
    writable_folder(given.out)
    data = load_data(given.data, given.split, given.images)
    defense = load_defense(given.defense, seed=0)
    wanted = [s for s in specs(given) if s.startswith(tuple(given.only or [""]))]
    worst, lines = torch.ones(len(data.labels), dtype=torch.bool), []
    for text in wanted:
        lines.append(line(*measure(defense, data, text, given), text, worst))
        print(*lines[-1].values(), sep=" | ", flush=True)
    table = pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    caption = (
        f"{given.defense}: {len(data.labels)} {given.split} images, {attack_caption(given)}, "
        f"judged on {given.judge_replicates} fresh draws, 95% Wilson intervals, seed {given.seed}."
    )
    print(f"\n{table}\n\n{caption}")
    name = f"attacks-{given.defense}-{given.split}-{len(data.labels)}.md"
    write_text(writable_folder(RESULTS) / name, f"{table}\n\n{caption}\n")
    return 0


def attack_caption(given: argparse.Namespace) -> str:
    """Return what all attacks share."""
    return f"Linf {dataset(given.data).eps:g}, as many steps and replicates as each row says"


if __name__ == "__main__":
    sys.exit(main())
