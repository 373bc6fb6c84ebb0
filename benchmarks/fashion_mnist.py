"""The README's table: the shipped Fashion-MNIST defenses and the control any purifier must beat.

    python benchmarks/fashion_mnist.py            # everything; hours on two CPU cores
    python benchmarks/fashion_mnist.py --only fashion-mnist --part transfer
    python benchmarks/fashion_mnist.py --bpda-images 96

Each defense is measured twice on stratified test images: clean and under transfer on 1,000, and
under the BPDA+EOT attack of protocol hill2021 at this data set's eps 0.1 on 200. Runs resume.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from common import Options, Result, main

from ebm_defense import UsageError, load_data, load_defense
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.eval import Protocol, Report, evaluate, get_protocol
from ebm_defense.eval.judging.statistics import paired
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import percent, plain_table
from ebm_defense.eval.storage.columns import WORST_OF_ALL, stands_column

EPS = 0.1
CONTROL = "fashion-mnist-gaussian"
DEFENSES = ("fashion-mnist", "fashion-mnist-longrun", CONTROL)
IMAGES = {"transfer": 1000, "bpda": 200}


def transfer() -> Protocol:
    """Clean accuracy, and PGD-40 images made on either bare classifier, in one pass."""
    pgd = PGD(threat=ThreatModel(eps=EPS), steps=40, step_size=EPS / 4)
    attacks = tuple(
        Transfer(attack=pgd, replicates=4, source=source) for source in ("undefended", "classifier")
    )
    return Protocol(name="transfer", attacks=attacks, judge_replicates=16)


def bpda() -> Protocol:
    """The published BPDA+EOT attack at this data set's eps."""
    protocol = get_protocol("hill2021", eps=EPS)
    return dataclasses.replace(protocol, attacks=protocol.attacks[-1:])


PARTS = {"transfer": transfer, "bpda": bpda}


def measure(name: str, part: str, images: int, folder: Path) -> Report:
    """Run one part on one defense, or read it from its finished shards."""
    data = load_data("fashion-mnist", "test", images)
    out = folder / f"{name}-{part}-{images}"
    return evaluate(load_defense(name, seed=0), *data, PARTS[part](), seed=0, out=out)


def line(report: Report, name: str) -> pd.DataFrame:
    """Return a report's rows with the defense's name in front."""
    table = report.table()
    table = table[table["attack"] != WORST_OF_ALL].copy()
    table["model"] = [name if m == "defended" else "undefended" for m in table["model"]]
    return table


def against_control(reports: list[tuple[str, str, Report]]) -> str:
    """Return a line for each attack on each energy: its verdicts beside the control's, by image."""
    controls = {part: report for name, part, report in reports if name == CONTROL}
    lines = []
    for name, part, report in reports:
        if name == CONTROL or part not in controls:
            continue
        for number, attack in enumerate(report.protocol.attacks):
            verdicts = stands_column(number, attack)
            found = paired(report.records[verdicts], controls[part].records[verdicts])
            lines.append(
                f"- {name} against {CONTROL}, {attack.name}: "
                f"{found.only_first} images stand only with it, {found.only_second} only with the "
                f"control (exact McNemar p = {found.p_value:.2g})\n"
            )
    return "".join(lines)


def markdown(reports: list[tuple[str, str, Report]]) -> str:
    """Return one Markdown table of all reports, and a caption for each."""
    rows = pd.concat([line(r, n) for n, _, r in reports]).drop_duplicates(["model", "attack"])
    shown = pd.DataFrame(
        {
            "model": rows["model"],
            "attack": rows["attack"],
            "accuracy %": [percent(v) for v in rows["accuracy"]],
            "95% interval": [
                f"{percent(a)} to {percent(b)}"
                for a, b in zip(rows["low"], rows["high"], strict=True)
            ],
            "images": rows["images"],
        }
    )
    captions = [f"- {name}, {part}: {report.caption()}" for name, part, report in reports]
    return RENDERERS["markdown"](plain_table(shown, words=2)) + "\n" + "\n".join(captions) + "\n"


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Options):
    """Measure the shipped defenses clean, under transfer and under BPDA+EOT."""

    only: tuple[str, ...] = DEFENSES
    """Which defenses."""
    part: tuple[str, ...] = tuple(PARTS)
    """transfer, bpda or both."""
    bpda_images: int = IMAGES["bpda"]
    """How many images BPDA+EOT gets."""

    def run(self) -> Result:
        """Measure each part of each defense."""
        for given, known in ((self.only, DEFENSES), (self.part, tuple(PARTS))):
            if unknown := sorted({*given} - {*known}):
                raise UsageError(f"unknown {unknown[0]!r}; choose among {', '.join(known)}.")
        images = IMAGES | {"bpda": self.bpda_images}
        folder = self.out / "fashion_mnist"
        reports = [(n, p, measure(n, p, images[p], folder)) for p in self.part for n in self.only]
        size = sum(images[p] for _, p, _ in reports)
        return Result("fashion_mnist", markdown(reports) + against_control(reports), size)


if __name__ == "__main__":
    sys.exit(main(FashionMnist))
