"""Which attack is the strongest on one defense: each judged alone, on the same images."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from ebm_defense.attacks import ThreatModel, make_attack
from ebm_defense.defense import as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.evaluate import evaluate
from ebm_defense.eval.judging.statistics import Share, share
from ebm_defense.eval.reporting.report import WORST_OF_ALL, stands_column

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


def called(part: str) -> str:
    """Return a part's name as it stands within another's settings."""
    return part if part.endswith(")") else f"{part}()"


class Outcome(NamedTuple):
    """What an attack left standing, 1 or 0 an image, and what it cost over all of them."""

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
    """Run attacks one by one, or read those that are finished, and yield what each left standing.

    Args:
        model: a `PurifiedClassifier`, or any classifier of [0, 1] images.
        images: `[N, C, H, W]` in [0, 1]; each attack gets the first ones.
        labels: true classes `[N]`.
        contests: which attacks, and how many images each.
        threat: what may change.
        judge_replicates: fresh draws of a verification.
        seed: of every stream.
        out: a folder, in which each attack has a run folder of its own.

    Raises:
        UsageError: as `make_attack` and `evaluate`; every attack is made before the first one runs.
    """
    attacks = [make_attack(c.attack, threat=threat) for c in contests]
    for attack in attacks:
        attack.chain_steps(as_defense(model))
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
        yield Outcome(contest.attack, stands, *costs)


def folder_name(attack: str) -> str:
    """Return a name of a file for an attack's."""
    return re.sub(r"[^\w.]+", "-", attack).strip("-")


def ranking(outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Return a row an attack, the strongest first, and one for the worst of all image by image.

    They are ranked by what they leave of the images that all of them had, then by what they leave
    of their own, then by cost. The first outcome is PGD around the purifier, whose accuracy on the
    same images stands beside each.
    """
    shared = min(len(o.stands) for o in outcomes)
    around = outcomes[0].stands
    ordered = sorted(
        outcomes, key=lambda o: (o.stands[:shared].sum(), o.stands.mean(), o.chain_steps)
    )
    worst = pd.concat([o.stands[:shared] for o in outcomes], axis=1).min(axis=1)
    steps, seconds = sum(o.chain_steps for o in outcomes), sum(o.seconds for o in outcomes)
    last = Outcome(WORST_OF_ALL, worst, steps, seconds)
    return pd.DataFrame([_row(o, around, shared) for o in (*ordered, last)])


def _row(outcome: Outcome, around: pd.Series[Any], shared: int) -> dict[str, str]:
    count, found = len(outcome.stands), _share(outcome.stands)
    return {
        "attack": outcome.attack,
        f"robust % of the first {shared}": _percent(_share(outcome.stands[:shared])),
        "robust %": _percent(found),
        "95% interval": f"{100 * found.low:.1f} to {100 * found.high:.1f}",
        "images": str(count),
        "BPDA on these %": _percent(_share(around[:count])),
        "chain-steps an image": f"{outcome.chain_steps / count:,.0f}",
        "seconds an image": f"{outcome.seconds / count:.1f}",
    }


def _share(stands: pd.Series[Any]) -> Share:
    return share(int(stands.sum()), len(stands))


def _percent(found: Share) -> str:
    return f"{100 * found.value:.1f}"
