"""Which attack is the strongest on one defense: each judged alone, on the same images."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ebm_defense.attacks import ThreatModel, make_attack
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.judging.judge import Stream, judge_once
from ebm_defense.eval.judging.rules import AsDeployed
from ebm_defense.eval.judging.selection import Selection, worst_place
from ebm_defense.eval.judging.statistics import mean_share
from ebm_defense.eval.reporting.table import interval, percent
from ebm_defense.eval.storage.columns import WORST_OF_ALL, attack_column, stands_column
from ebm_defense.interface.numbers import plain_numbers

LOSSES, OPTIMISERS = ("ce", "dlr"), ("pgd", "apgd")
ROUND = "bpda"
"""The gradient around the purifier, beside which all others are shown."""


class Contest(NamedTuple):
    """One attack by its name and settings, and how many images it gets."""

    attack: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Field:
    """Which attacks take part, and what each may spend.

    Attributes:
        gradients: through the purifier, by name, beside `bpda`; DiffHammer and targeted APGD take
            the first, or `bpda` where there is none.
        steps: of PGD, APGD and DiffHammer.
        replicates: attack replicates.
        images: how many of a sample's first images the cheap, the middling and the dear ones get.
        also: more attacks by name, on as many images as the middling ones.

    Raises:
        UsageError: numbers of images that are not above 0 and falling.
    """

    gradients: tuple[str, ...] = ()
    steps: int = 20
    replicates: int = 8
    images: tuple[int, int, int] = (200, 64, 32)
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.images[-1] < 1 or sorted(self.images, reverse=True) != list(self.images):
            raise UsageError(
                "images are three numbers above 0, for cheap, middling and dear attacks, none "
                f"larger than the one before it, not {', '.join(map(str, self.images))}."
            )

    def contests(self) -> list[Contest]:
        """Return the attacks: first PGD around the purifier, then the cheap ones to the dear."""
        cheap, middling, dear = self.images
        first, *around = self._climbs(ROUND, cheap)
        through = [c for g in self.gradients for c in self._climbs(g, middling)]
        best, each = called((*self.gradients, ROUND)[0]), f"replicates={self.replicates}"
        return [
            first,
            Contest(f"transfer(steps=40, {each})", cheap),
            *around,
            *through,
            Contest(f"diffhammer(steps={self.steps}, restarts=1, gradient={best})", middling),
            *(Contest(also, middling) for also in self.also),
            Contest(f"apgd-t(targets=3, steps=30, {each}, gradient={best})", dear),
            Contest("square(steps=500, replicates=4, rescale=True)", dear),
            Contest("spsa(steps=20, gradient=score-free(samples=64))", dear),
        ]

    def _climbs(self, gradient: str, images: int) -> list[Contest]:
        spent = f"steps={self.steps}, replicates={self.replicates}"
        return [
            Contest(f"{o}({spent}, loss={loss}(), gradient={called(gradient)})", images)
            for loss in LOSSES
            for o in OPTIMISERS
        ]


def called(gradient: str) -> str:
    """Return a gradient's name as it stands within an attack's settings."""
    return gradient if gradient.endswith(")") else f"{gradient}()"


class Outcome(NamedTuple):
    """An attack's verdicts on its images, in [0, 1], and what it cost over all of them."""

    attack: str
    stands: pd.Series[Any]
    chain_steps: float
    seconds: float


def compete(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    contests: Sequence[Contest],
    *,
    threat: ThreatModel,
    judge_replicates: int = 64,
    seed: int = 0,
    out: Path,
) -> Iterator[Outcome]:
    """Run attacks one by one, or read those that are finished, and yield what each left.

    The last outcome, of more than one attack, is of the worst image that any of them found, of the
    images that all had: chosen by draws common to all, and judged once.

    Args:
        model: a `PurifiedClassifier`, or any classifier of [0, 1] images.
        images: `[N, C, H, W]` in [0, 1]; each attack gets the first ones.
        labels: true classes `[N]`.
        contests: which attacks, and how many images each.
        threat: what may change.
        judge_replicates: fresh draws of a judgement.
        seed: of every stream.
        out: a folder, in which each attack has a run folder of its own.

    Raises:
        UsageError: as `make_attack` and `evaluate`; every attack is made before the first one runs.
    """
    attacks = [make_attack(c.attack, threat=threat) for c in contests]
    for attack in attacks:
        attack.chain_steps(as_defense(model))
    found: list[Tensor] = []
    for contest, attack in zip(contests, attacks, strict=True):
        count = min(contest.images, len(images))
        report = evaluate(
            model,
            images[:count],
            labels[:count],
            attacks=[attack],
            judge_replicates=judge_replicates,
            seed=seed,
            out=out / f"{count}-{folder_name(contest.attack)}",
        )
        stands = report.outcomes(stands_column(0, attack)).reset_index(drop=True)
        costs = (cost.get(attack.name, 0.0) for cost in (report.chain_steps, report.seconds))
        found.append(report.adversarial[attack_column(0, attack)].to(images.device))
        yield Outcome(contest.attack, stands, *costs)
    if len(found) > 1:
        yield _worst(as_defense(model), found, labels, judge_replicates, seed)


def _worst(
    defense: PurifiedClassifier, found: list[Tensor], labels: Tensor, draws: int, seed: int
) -> Outcome:
    """Judge the worst image that any attack found, of the images that all attacks had."""
    shared, spent = min(map(len, found)), [0]
    images, ids = torch.stack([x[:shared] for x in found]), range(shared)

    def count_steps(steps: int) -> None:
        spent[0] += steps

    begun, truth = time.perf_counter(), labels[:shared]
    selecting = Stream(seed, "select worst of all", Selection().draws, count_steps)
    place = worst_place(defense, images, truth, ids, selecting)
    judging = Stream(seed, "judge worst of all", draws, count_steps)
    chosen = images[place, torch.arange(shared)]
    judged = judge_once(defense, chosen, truth, ids, judging, AsDeployed())
    verdicts = pd.Series(judged.stands.tolist())
    return Outcome(WORST_OF_ALL, verdicts, spent[0], time.perf_counter() - begun)


def folder_name(attack: str) -> str:
    """Return a name of a file for an attack's."""
    return re.sub(r"[^\w.]+", "-", attack).strip("-")


def ranking(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return a row an attack, the strongest first, and last the worst of all, if it was judged.

    They are ranked by what they leave of the images that all of them had, then by what they leave
    of their own, then by cost. The first outcome is PGD around the purifier, whose accuracy on the
    same images stands beside each.
    """
    shared = min(len(o.stands) for o in outcomes)
    around = outcomes[0].stands
    attacks = [o for o in outcomes if o.attack != WORST_OF_ALL]
    ordered = sorted(
        attacks, key=lambda o: (o.stands[:shared].sum(), o.stands.mean(), o.chain_steps)
    )
    last = [o for o in outcomes if o.attack == WORST_OF_ALL]
    return pd.DataFrame([_row(o, around, shared) for o in (*ordered, *last)])


def _row(outcome: Outcome, around: pd.Series[Any], shared: int) -> dict[str, str]:
    count, found = len(outcome.stands), mean_share(outcome.stands)
    return {
        "attack": outcome.attack,
        f"robust % of the first {shared}": percent(outcome.stands[:shared].mean()),
        "robust %": percent(found.value),
        "95% interval": interval(found),
        "images": str(count),
        "BPDA on these %": percent(around[:count].mean()),
        "chain-steps an image": f"{outcome.chain_steps / count:,.0f}",
        "seconds an image": f"{outcome.seconds / count:.1f}",
    }
