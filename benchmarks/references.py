"""Set our attacks beside torchattacks' on the undefended shipped classifier, at equal budgets.

Both sides get the same images, norm, eps, steps, targets, restarts and, where there is a random one
that both can take (untargeted APGD), the same start. PGD starts at the image, Square at stripes in
Linf and at bumps in L2, targeted APGD at random. An image counts as broken where any iterate of an
ascent was wrong, on both sides, and for PGD where the last one is. torchattacks' Square stretches
its schedule to the budget, so ours is told to. Images that the classifier gets wrong as they are
count as broken. The table shows robust accuracies, with the images that one side alone breaks and
McNemar's exact p-value:

    python benchmarks/references.py --images 1000
    python benchmarks/references.py --norm L2 --eps 0.5 --seed 1

Without options it runs 200 validation images.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import OnImages, Result, main, table
from torch import Tensor, nn

from ebm_defense import UsageError, load_data, load_defense
from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    Attack,
    Margin,
    Square,
    TargetedAPGD,
    ThreatModel,
)
from ebm_defense.attacks.base import lenient
from ebm_defense.data import Images
from ebm_defense.defense import as_defense
from ebm_defense.eval.judging.statistics import paired_p_value

CLASSES = 10
BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every attack may spend.

    Attributes:
        norm: Linf or L2; torchattacks attacks in no other.
        eps: in [0, 1] pixel units.
        steps: of PGD and APGD.
        queries: of Square.
        seed: of both sides.
    """

    norm: str
    eps: float
    steps: int
    queries: int
    seed: int

    @property
    def threat(self) -> ThreatModel:
        """The threat model of our side."""
        return ThreatModel(norm=self.norm, eps=self.eps)

    @property
    def ball(self) -> dict[str, Any]:
        """The threat model of the other side, and the seed."""
        return {"norm": self.norm, "eps": self.eps, "seed": self.seed}


class Pair(NamedTuple):
    """One attack on both sides.

    Attributes:
        ours: it.
        theirs: torchattacks' name for it.
        settings: torchattacks' settings for it.
        shared: whether torchattacks starts where ours does.
    """

    ours: Callable[[Budget], Attack]
    theirs: Callable[[Budget], str]
    settings: Callable[[Budget], dict[str, Any]]
    shared: bool = False


PAIRS = {
    "PGD": Pair(
        lambda b: PGD(
            threat=b.threat, steps=b.steps, step_size=b.eps / 4, replicates=1, random_start=False
        ),
        lambda b: {"Linf": "PGD", "L2": "PGDL2"}[b.norm],
        lambda b: {"eps": b.eps, "alpha": b.eps / 4, "steps": b.steps, "random_start": False},
    ),
    "APGD-CE": Pair(
        lambda b: APGD(threat=b.threat, steps=b.steps),
        lambda b: "APGD",
        lambda b: b.ball | {"steps": b.steps, "loss": "ce"},
        shared=True,
    ),
    "APGD-DLR": Pair(
        lambda b: APGD(threat=b.threat, steps=b.steps, loss=DLR()),
        lambda b: "APGD",
        lambda b: b.ball | {"steps": b.steps, "loss": "dlr"},
        shared=True,
    ),
    "APGD-T": Pair(
        lambda b: TargetedAPGD(threat=b.threat, steps=b.steps, targets=CLASSES - 1),
        lambda b: "APGDT",
        lambda b: b.ball | {"steps": b.steps, "n_classes": CLASSES},
    ),
    "Square": Pair(
        lambda b: Square(threat=b.threat, steps=b.queries, loss=Margin(), rescale=True),
        lambda b: "Square",
        lambda b: b.ball | {"n_queries": b.queries, "loss": "margin"},
    ),
}


class Found(NamedTuple):
    """What one side found of a batch, and how long it took."""

    images: Tensor
    seconds: float


def ours(attack: Attack, model: nn.Module, batch: Images, seed: int) -> tuple[Found, Tensor]:
    """Attack a batch with ours, and return its start too.

    What is found is wrong if any iterate that the attack may keep was.
    """
    begun, starts = time.perf_counter(), []

    def judge(proposal: Any) -> Tensor:
        starts.append(proposal.images)
        return lenient(proposal)

    ids, defense = range(len(batch.labels)), as_defense(model)
    found = attack.run(defense, *batch, ids=ids, seed=seed, judge=judge)
    return Found(found, time.perf_counter() - begun), starts[0]


def theirs(
    pair: Pair, model: nn.Module, batch: Images, budget: Budget, start: Tensor | None
) -> Found:
    """Attack a batch with torchattacks, from a start of its own if none is given."""
    torchvision("datasets")  # torchattacks imports it, and it does not load everywhere by itself
    import torchattacks

    begun = time.perf_counter()
    with torch.random.fork_rng(), drawn(start, batch.images, budget):
        torch.manual_seed(budget.seed)
        attack = getattr(torchattacks, pair.theirs(budget))(model, **pair.settings(budget))
        found: Tensor = attack(*batch).detach()
    return Found(found, time.perf_counter() - begun)


@contextmanager
def drawn(start: Tensor | None, originals: Tensor, budget: Budget) -> Iterator[None]:
    """Draw what leads torchattacks' APGD to a start.

    It goes eps along t: in Linf 2·rand − 1, scaled to max |t| = 1, in L2 randn, scaled to norm 1.
    """
    if start is None:
        yield
        return
    way = (start - originals) / budget.eps
    name, value = ("rand", (way + 1.0) / 2.0) if budget.norm == "Linf" else ("randn", way)
    with mock.patch.object(torch, name, return_value=value):
        yield


@torch.no_grad()
def stands(model: nn.Module, found: Tensor, batch: Images, threat: ThreatModel) -> Tensor:
    """Tell which images are still right, within the threat model."""
    right: Tensor = model(threat.project(found, batch.images)).argmax(1) == batch.labels
    return right


def compare(
    name: str, pair: Pair, model: nn.Module, data: Images, budget: Budget
) -> dict[str, str]:
    """Run one attack on both sides, on the images that are right as they are."""
    clean = stands(model, data.images, data, budget.threat)
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    seconds = [0.0, 0.0]
    parts = zip(data.images[clean].split(BATCH), data.labels[clean].split(BATCH), strict=True)
    for number, batch in enumerate(Images(*part) for part in parts):
        mine, start = ours(pair.ours(budget), model, batch, budget.seed + number)
        other = theirs(pair, model, batch, budget, start if pair.shared else None)
        for side, found in enumerate((mine, other)):
            sides[side].append(stands(model, found.images, batch, budget.threat))
            seconds[side] += found.seconds
    one, two = (torch.cat(side) for side in sides)
    return {"attack": name} | row(one, two, seconds, len(clean))


def row(one: Tensor, two: Tensor, seconds: Sequence[float], images: int) -> dict[str, str]:
    """Return what the table says of the images that stand on our side and on the other."""
    a, b = (100.0 * float(side.sum()) / images for side in (one, two))
    return {
        "ours (%)": f"{a:.1f}",
        "torchattacks (%)": f"{b:.1f}",
        "difference": f"{a - b:+.1f}",
        "ours alone": str(int((two & ~one).sum())),
        "torchattacks alone": str(int((one & ~two).sum())),
        "p": f"{paired_p_value(one, two):.2f}",
        "ours (s)": f"{seconds[0]:.0f}",
        "torchattacks (s)": f"{seconds[1]:.0f}",
    }


@dataclass(frozen=True, kw_only=True)
class References(OnImages):
    """Set our attacks beside torchattacks' on an undefended classifier, at equal budgets."""

    split: str = "val"
    """train, val or test."""
    images: int = 200
    """How many images, a stratified sample."""
    norm: str = "Linf"
    """Linf or L2."""
    eps: float = 0.02
    """In [0, 1] pixel units."""
    steps: int = 100
    """Of PGD and APGD."""
    queries: int = 1000
    """Of Square."""
    attacks: tuple[str, ...] = tuple(PAIRS)
    """Which attacks."""

    def run(self) -> Result:
        """Run the pairs."""
        if unknown := sorted({*self.attacks} - {*PAIRS}):
            raise UsageError(f"unknown attack {unknown[0]!r}; choose among {', '.join(PAIRS)}.")
        budget = Budget(
            norm=self.norm, eps=self.eps, steps=self.steps, queries=self.queries, seed=self.seed
        )
        data = load_data(self.data, self.split, self.images)
        model = load_defense(self.defense).undefended.eval().requires_grad_(False)
        rows = (compare(name, PAIRS[name], model, data, budget) for name in self.attacks)
        text = f"{table(rows)}\n\n{self._caption(budget, clean_accuracy(model, data))}"
        return Result(f"references-{self.norm}", text, self.images * len(self.attacks))

    def _caption(self, budget: Budget, clean: float) -> str:
        return (
            f"The undefended classifier of {self.defense}, {self.images} {self.split} images, "
            f"clean {100 * clean:.1f}%, {budget.threat}, {self.steps} steps, {self.queries} "
            f"queries, seed {self.seed}."
        )


@torch.no_grad()
def clean_accuracy(model: nn.Module, data: Images) -> float:
    """Return the share of images that a classifier gets right as they are."""
    return float((model(data.images).argmax(1) == data.labels).float().mean())


if __name__ == "__main__":
    sys.exit(main(References))
