"""Rules by which fresh draws become a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.defense import PurifiedClassifier

Draw = Callable[[Tensor, range], Tensor]
"""Maps indices `[n]` of a batch and replicate numbers to fresh logits `[r, n, classes]`."""
Combine = Callable[[Tensor], Tensor]
"""Averages replicate logits `[r, b, classes]` to `[b, classes]`, as the defense does."""


class Ruling(NamedTuple):
    """What a rule found of each image, all `[b]`.

    Attributes:
        stands: whether the image counts as classified correctly; as deployed, the share of
            predictions that are right, in [0, 1].
        decided: whether the rule is sure; an undecided image counts both ways in intervals.
        draws: fresh draws that it took.
        right: how many of them were right.
    """

    stands: Tensor
    decided: Tensor
    draws: Tensor
    right: Tensor


class Rule(Protocol):
    """How an image is judged; `name` stands in tables."""

    @property
    def name(self) -> str: ...

    def suspects(self, logits: Tensor, labels: Tensor, combine: Combine) -> Tensor:
        """Return which images the attack's own logits `[r, b, classes]` bring before the judge."""
        ...

    def judge(
        self,
        draw: Draw,
        labels: Tensor,
        combine: Combine,
        *,
        most: int,
        looks: Tensor,
        predicted: int = 1,
    ) -> Ruling:
        """Judge a batch on at most `most` fresh draws an image.

        Args:
            draw: gives fresh draws of some of the images; first of all of them together.
            labels: true classes `[b]`.
            combine: the defense's own average.
            most: H, at least 1.
            looks: how often each image has come before the judge, this time included, `[b]`.
            predicted: R, the draws that one prediction of the defense averages.
        """
        ...


def predicted_draws(defense: PurifiedClassifier) -> int:
    """Return R, the draws that one prediction averages: one where all would be the same."""
    return len(attack_replicates(defense.replicates, defense))


def as_deployed(logits: Tensor, labels: Tensor, combine: Combine, predicted: int) -> Tensor:
    """Return the share `[b]` of predictions that are right, each the average of R fresh draws.

    Disjoint groups of R draws are as many predictions of independent noise as H draws hold, so
    the mean is unbiased; draws left over are of no prediction. NaN where H < R.

    Args:
        logits: fresh draws `[H, b, classes]`.
        labels: true classes `[b]`.
        combine: the defense's own average.
        predicted: R.
    """
    groups = logits[: len(logits) // predicted * predicted].split(predicted)
    right = [combine(group).argmax(-1) == labels for group in groups if len(group)]
    if not right:
        return torch.full(labels.shape, torch.nan, dtype=torch.float64)
    return torch.stack(right).double().mean(0)


def vote_counts(logits: Tensor) -> Tensor:
    """Return how many draws voted for each class, `[b, classes]`, from `[r, b, classes]`."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)


def right_votes(counts: Tensor, labels: Tensor) -> Tensor:
    """Return the votes for the label, `[b]`, from `[b, classes]`."""
    return counts.gather(1, labels[:, None].to(counts.device))[:, 0]


def has_majority(counts: Tensor, labels: Tensor) -> Tensor:
    """Return whether the label has more votes than every other class; a tie is no majority."""
    rivals = counts.scatter(1, labels[:, None].to(counts.device), -1)
    return right_votes(counts, labels) > rivals.amax(1)


def _wrong(logits: Tensor, labels: Tensor, combine: Combine) -> Tensor:
    return combine(logits).argmax(-1) != labels


@dataclass(frozen=True, kw_only=True)
class OneStage:
    """Every image that is put before the judge is drawn H times; their average decides.

    The rule under which Du, Hill, Cai (2026) validate final images.
    """

    name: str = field(default="one-stage", init=False)

    def suspects(self, logits: Tensor, labels: Tensor, combine: Combine) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def judge(
        self,
        draw: Draw,
        labels: Tensor,
        combine: Combine,
        *,
        most: int,
        looks: Tensor,
        predicted: int = 1,
    ) -> Ruling:
        logits = draw(torch.arange(len(labels)), range(most))
        return Ruling(
            stands=self._stands(logits, labels, combine, predicted),
            decided=torch.ones_like(labels, dtype=torch.bool),
            draws=torch.full_like(labels, most),
            right=right_votes(vote_counts(logits), labels),
        )

    def _stands(self, logits: Tensor, labels: Tensor, combine: Combine, predicted: int) -> Tensor:
        return ~_wrong(logits, labels, combine)


@dataclass(frozen=True, kw_only=True)
class AsDeployed(OneStage):
    """Every image is drawn H times, and counts with the share of predictions that are right.

    A prediction is what a user of the defense gets: its average of R = `replicates` draws. See
    `as_deployed`.
    """

    name: str = "as deployed"

    def _stands(self, logits: Tensor, labels: Tensor, combine: Combine, predicted: int) -> Tensor:
        return as_deployed(logits, labels, combine, predicted)


@dataclass(frozen=True, kw_only=True)
class TwoStage(OneStage):
    """The rule of Hill, Mitchell, Zhu (2021): only images that the attack's own replicates,
    averaged, get wrong are drawn H times; the average of those fresh draws decides.
    """

    name: str = field(default="two-stage", init=False)

    def suspects(self, logits: Tensor, labels: Tensor, combine: Combine) -> Tensor:
        return _wrong(logits, labels, combine)
