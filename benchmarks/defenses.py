"""The table of the defenses that ship: clean, transferred, cheap and strongest attack, paired.

    python benchmarks/defenses.py --out runs/defenses              # hours of a core; it resumes
    python benchmarks/defenses.py --only adversarial gaussian

Each row is evaluated twice, in a run folder of its own each: by protocol `standard`, and by cheap
attacks on more images. README and model cards quote the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Options, Result, main, table
from torch import nn

from ebm_defense.attacks import APGD, PGD, Auto, CrossEntropy, ThreatModel, Transfer
from ebm_defense.classifiers import normalized
from ebm_defense.data import load_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval import Protocol, Report, evaluate, get_protocol
from ebm_defense.eval.judging.statistics import Share, paired_p_value
from ebm_defense.eval.reporting.table import interval, percent
from ebm_defense.eval.storage.columns import WORST_OF_ALL
from ebm_defense.learning.classifier import ClassifierRecipe, ClassifierTrainer
from ebm_defense.purifiers.baselines import NoPurifier
from ebm_defense.storage.files import load_tensors, save_tensors
from ebm_defense.storage.weights import load_defense, load_purifier

ENERGY, CONTROL, NOISE = "fashion-mnist", "fashion-mnist-adversarial", "fashion-mnist-gaussian"
EXACT = "fp32"


@dataclass(frozen=True)
class Row:
    """A defense of the table, and the row on which it must improve.

    Attributes:
        title: what the table calls it.
        make: makes it; takes the folder of what is made on the way.
        against: the key of the row that it is tested against, on the same images.
        most: how many images protocol `standard` attacks at most.
    """

    title: str
    make: Callable[[Path], PurifiedClassifier]
    against: str = ""
    most: int = 10_000


def shipped(name: str) -> Callable[[Path], PurifiedClassifier]:
    """Return what loads a shipped defense, or a folder of OUT by that name."""

    def load(out: Path) -> PurifiedClassifier:
        folder = out / name
        return load_defense(folder if folder.is_dir() else name, verdict_precision=EXACT)

    return load


def natural(_: Path) -> PurifiedClassifier:
    """Return the classifier behind the energy alone, as it was trained: naturally."""
    return PurifiedClassifier(
        load_defense(ENERGY).classifier, NoPurifier(), verdict_precision=EXACT
    )


def before_another(out: Path) -> PurifiedClassifier:
    """Return the energy before a natural network that it never saw."""
    return PurifiedClassifier(
        unseen(out / "unseen.safetensors"), load_purifier(ENERGY), verdict_precision=EXACT
    )


ROWS: dict[str, Row] = {
    "natural": Row("natural wide ResNet 10-2, no defense", natural),
    "adversarial": Row("(c) adversarial training, no purifier", shipped(CONTROL)),
    "gaussian": Row("(d) Gaussian noise, trained through it", shipped(NOISE), "adversarial"),
    "energy": Row("(a) energy before the natural wide ResNet", shipped(ENERGY), "gaussian"),
    "another": Row(
        "(a) before a natural network that it never saw", before_another, "energy", most=64
    ),
    "together": Row(
        "(b) energy and classifier together", shipped("fashion-mnist-together"), "adversarial"
    ),
    "trades": Row("TRADES, no purifier", shipped("trades"), "adversarial"),
}


def small_vgg() -> nn.Module:
    """Return a network unlike those that the energy was learned with: VGG's blocks, max pooling."""
    blocks = [
        layer
        for inner, outer in ((1, 24), (24, 48))
        for layer in (nn.Conv2d(inner, outer, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    head = [nn.Conv2d(48, 96, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96 * 49, 96)]
    return normalized(nn.Sequential(*blocks, *head, nn.ReLU(), nn.Linear(96, 10)), 0.5, 0.5)


def unseen(file: Path) -> nn.Module:
    """Return that network trained naturally: as it lies in a file, or trained and kept there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_vgg()
    if file.exists():
        network.load_state_dict(load_tensors(file))
    else:
        data = load_data("fashion-mnist", "train")
        recipe = ClassifierRecipe(epochs=4, lr=0.02, padding=0, flip=False)
        for epoch in ClassifierTrainer(network, *data, recipe).run():
            print(epoch, flush=True)
        save_tensors(file, network.state_dict())
    return network.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Defenses(Options):
    """Clean and robust accuracy of the shipped defenses and of what they are measured against."""

    only: tuple[str, ...] = tuple(ROWS)
    """Which rows; trades is a defense folder of that name in OUT."""
    images: int = 300
    """How many test images are attacked by protocol `standard`."""
    chained: int = 128
    """How many of them where a chain is gone through, which is dear."""
    many: int = 1000
    """How many are attacked cheaply, and measured clean."""
    many_chained: int = 500
    """How many of them where a chain is gone through."""
    eps: float = 0.1
    """Largest Linf perturbation, in [0, 1] units."""
    steps: int = 20
    """Attack steps; Square has 50 queries for each."""
    replicates: int = 1
    """Attack replicates."""
    judge_replicates: int = 16
    """Fresh draws of a judgement, and of the selection of what is judged."""
    finished: bool = False
    """Measure nothing more: show the runs that are finished in OUT."""

    def run(self) -> Result:
        """Evaluate each row twice and set them side by side."""
        if unknown := set(self.only) - set(ROWS):
            raise UsageError(f"unknown row {min(unknown)!r}; choose among {', '.join(ROWS)}.")
        strong = self._reports("standard")
        cheap = self._reports("cheap")
        shown = table(_line(key, strong, cheap.get(key)) for key in strong)
        size = sum(len(report.records) for report in strong.values())
        return Result("defenses", f"{shown}\n\n{self._caption()}", size)

    def _reports(self, kind: str) -> dict[str, Report]:
        wanted = (k for k in self.only if not self.finished or self._finished(k, kind))
        return {key: self._evaluate(key, kind) for key in wanted}

    def _finished(self, key: str, kind: str) -> bool:
        return (self.out / kind / key / "table.csv").exists()

    def _evaluate(self, key: str, kind: str) -> Report:
        defense = ROWS[key].make(self.out)
        chain, cheap = bool(defense.purifier.chain_steps), kind == "cheap"
        protocol = self._cheap(defense) if cheap else self._standard()
        counts = (self.many, self.many_chained) if cheap else (self.images, self.chained)
        count = counts[chain] if cheap else min(counts[chain], ROWS[key].most)
        data = load_data("fashion-mnist", "test", count)
        return evaluate(defense, *data, protocol, seed=self.seed, out=self.out / kind / key)

    def _standard(self) -> Protocol:
        return get_protocol(
            "standard", eps=self.eps, steps=self.steps, replicates=self.replicates,
            judge_replicates=self.judge_replicates, selection_replicates=self.judge_replicates,
        )  # fmt: skip

    def _cheap(self, defense: PurifiedClassifier) -> Protocol:
        """Return the transfer from (c) and PGD through the chain, whose last images are judged; and
        APGD where no noise makes it dear.
        """
        threat, replicates = ThreatModel(eps=self.eps), self.replicates
        pgd = PGD(
            threat=threat, steps=self.steps, step_size=self.eps / 4, replicates=replicates,
            gradient=Auto(),
        )  # fmt: skip
        source = load_defense(CONTROL).requires_grad_(False)
        moved = Transfer(attack=pgd, replicates=replicates, source=source, label=CONTROL)
        apgd = APGD(threat=threat, steps=self.steps, gradient=Auto(), loss=CrossEntropy())
        attacks = (moved, pgd) if defense.purifier.stochastic else (moved, pgd, apgd)
        return Protocol(
            name="cheap", attacks=attacks, judge_replicates=self.judge_replicates, looks="last"
        )

    def _caption(self) -> str:
        return (
            f"Accuracy in % and its 95% Wilson interval, Fashion-MNIST test images, Linf "
            f"{self.eps:g}, by the prediction as it is deployed (the mean logits of 16 draws). "
            f"Strongest: what stands under all of protocol standard ({self.steps} steps of each "
            f"attack, {50 * self.steps} queries of Square, {self.replicates} attack replicate), "
            "on so many images as each cell says, always the first ones of the same order; "
            "the image to judge is selected on "
            f"{self.judge_replicates} draws and judged once on {self.judge_replicates} others. "
            f"Clean, transfer (PGD-{self.steps} on {CONTROL}), PGD-{self.steps} (steps of eps/4) "
            f"and, where nothing is random, APGD-{self.steps} on cross-entropy through the chain: "
            "the last iterate judged. "
            "Paired: points of the strongest attack ahead of the row named and the paired test's "
            "p, on the images that both have. Verdicts in fp32, seed "
            f"{self.seed}."
        )


def _line(key: str, strong: Mapping[str, Report], cheap: Report | None) -> dict[str, str]:
    row, report = ROWS[key], strong[key]
    clean = report if cheap is None else cheap
    made = 0 if cheap is None else len(cheap.protocol.attacks)
    weak = [_said(cheap.robust(i)) if cheap and i < made else "–" for i in range(3)]
    return {
        "defense": row.title,
        "clean": _said(clean.share(clean.natural_column())),
        **dict(zip(("transfer", "PGD", "APGD"), weak, strict=True)),
        "strongest": _said(report.robust()),
        "paired": _tested(report, strong[row.against], row) if row.against in strong else "–",
    }


def _tested(report: Report, rival: Report, row: Row) -> str:
    """Return how far a row is ahead of its rival on the images that both have, and p."""
    both = min(len(report.records), len(rival.records))
    one, two = (r.outcomes(WORST_OF_ALL)[:both].astype(float) for r in (report, rival))
    ahead = 100 * float((one - two).mean())
    return f"{ahead:+.1f} to {_letter(row.against)}, p = {paired_p_value(one, two):.2g}"


def _letter(key: str) -> str:
    return ROWS[key].title.split()[0]


def _said(found: Share) -> str:
    return f"{percent(found.value)} ({interval(found)}) of {found.total:,}"


if __name__ == "__main__":
    sys.exit(main(Defenses))
