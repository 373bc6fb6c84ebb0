"""A verdict that stops drawing when it is sure.

Each draw of an image is a vote for one class, and the votes are independent and of one
distribution P. The image stands if P(label) > P(j) for every other class j: if infinitely many
draws would elect its label. This is the majority verdict. It may differ from the sign of the
infinite mean of the logits, where a minority of draws has large ones: logits are unbounded, so
that no number of draws bounds their mean without assumptions, and votes are not.

**Why it holds at any stopping time.** Among the votes for one of two classes u and v, with a for u
and b for v so far, let

    E(a, b) = 2·∫_{1/2}^{1} (2q)^a·(2(1 − q))^b dq
            = 2^{a+b+1}·B(a + 1, b + 1)·I_{1/2}(b + 1, a + 1),

B the beta function and I the regularised incomplete one. If P(u) ≤ P(v), a vote multiplies the
integrand, in the mean, by at most 1 (it is 1 + (2q − 1)(2p − 1) for a vote that is for u with
probability p ≤ 1/2, and votes for other classes leave it as it is), so that E is a nonnegative
supermartingale which starts at 1, and by Ville's inequality (1939) P(E ever reaches 1/α) ≤ α.
It is Robbins's (1970) method of mixtures with a uniform prior; deciding an election by such
one-against-one tests is the rule PPR-1v1 of Jain et al. (2022, PAC Mode Estimation using PPR
Martingale Confidence Sequences).

*Stands* is said when E(label, j) ≥ 1/α for every j: if some j beats or ties the label, that one
test alone errs with probability at most α. *Broken* is said when the mean over j of E(j, label)
reaches 1/α: if the label wins, each term is such a supermartingale, and so is their mean.
An image may come before the judge more than once in an attack; its k-th time is judged at the
level α/(k(k + 1)), and these sum to α.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaln
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.rules import (
    Combine,
    Draw,
    Ruling,
    has_majority,
    right_votes,
    vote_counts,
)
from ebm_defense.interface.numbers import plain_numbers

GROWTH = 1.4
STANDS, BROKEN, OPEN = 1, 0, -1


def log_evidence(ahead: ArrayLike, behind: ArrayLike) -> NDArray[np.float64]:
    """Return log E(a, b): evidence in votes that the class with a of them has the larger share."""
    a, b = (np.asarray(v, dtype=float) for v in (ahead, behind))
    with np.errstate(divide="ignore"):
        upper = np.log(betainc(b + 1.0, a + 1.0, 0.5))
    found: NDArray[np.float64] = (a + b + 1.0) * math.log(2.0) + betaln(a + 1.0, b + 1.0) + upper
    return found


def decide(counts: ArrayLike, labels: ArrayLike, alpha: ArrayLike) -> NDArray[np.int64]:
    """Return STANDS, BROKEN or OPEN for each image, at an error level of `alpha`.

    Args:
        counts: votes so far, `[b, classes]`, at least two classes.
        labels: true classes `[b]`.
        alpha: one level, or one an image.
    """
    votes, label = np.asarray(counts), np.asarray(labels)
    rows = np.arange(len(votes))
    rivals = np.ones(votes.shape, dtype=bool)
    rivals[rows, label] = False
    others = votes[rivals].reshape(len(votes), -1)
    mine = votes[rows, label][:, None]
    needed = -np.log(np.broadcast_to(np.asarray(alpha, dtype=float), (len(votes),)))
    stands = log_evidence(mine, others).min(1) >= needed
    against = np.logaddexp.reduce(log_evidence(others, mine), axis=1) - math.log(others.shape[1])
    found: NDArray[np.int64] = np.where(stands, STANDS, np.where(against >= needed, BROKEN, OPEN))
    return found


def schedule(alpha: float, most: int, least: int = 1) -> Iterator[range]:
    """Yield batches of replicate numbers: up to where a unanimous vote decides, then growing.

    Args:
        alpha: the error level.
        most: draws, at most.
        least: how many the first batch holds at least.
    """
    unanimous = next(n for n in range(1, 10_000) if log_evidence(n, 0) >= -math.log(alpha))
    done, upto = 0, max(unanimous, least)
    while done < most:
        upto = min(max(upto, done + 1), most)
        yield range(done, upto)
        done, upto = upto, math.ceil(upto * GROWTH)


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """The anytime-valid test of this module, on the votes of fresh draws.

    All images still open draw their next batch together; the first batch holds a whole prediction
    of the defense at least. Where every look of an attack comes before the judge, it judges those
    that the attack's own replicates get wrong, here by their votes, a tie included.

    Attributes:
        alpha: the chance, at most, that a decided image is decided wrongly in one attack, between
            0 and 1.
    """

    alpha: float = 0.01
    name: str = field(default="sequential", init=False)

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not 0.0 < self.alpha < 1.0:
            raise UsageError(f"the error level alpha must lie between 0 and 1, not {self.alpha}.")

    def suspects(self, logits: Tensor, labels: Tensor, combine: Combine) -> Tensor:
        return ~has_majority(vote_counts(logits), labels)

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
        truth, count = labels.cpu(), len(labels)
        levels = (self.alpha / (looks * (looks + 1.0))).double().cpu()
        found = torch.full((count,), OPEN)
        draws = torch.zeros(count, dtype=torch.int64)
        counts = torch.zeros((count, 0), dtype=torch.int64)
        for numbers in schedule(self.alpha / 2.0, most, predicted):
            still = (found == OPEN).nonzero().flatten()
            if not len(still):
                break
            fresh = vote_counts(draw(still, numbers)).cpu()
            counts = counts if counts.shape[1] else counts.new_zeros((count, fresh.shape[1]))
            counts[still] += fresh
            draws[still] = numbers.stop
            found[still] = torch.from_numpy(decide(counts[still], truth[still], levels[still]))
        return Ruling(
            stands=torch.where(found == OPEN, has_majority(counts, truth), found == STANDS),
            decided=found != OPEN,
            draws=draws,
            right=right_votes(counts, truth),
        )
