"""The Square attack: random search by squares, without gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.ascent import attack_name, check_budget, check_positive
from ebm_defense.attacks.base import DirectCall, Judge, attack_replicates, lenient
from ebm_defense.attacks.hearing import Hearing, Seen
from ebm_defense.attacks.losses import Loss, Margin, refuse_targeted
from ebm_defense.attacks.threat import ThreatModel, per_image
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SCHEDULED = 10_000  # queries that the halvings were made for


def side(query: int, p: float, height: int, width: int) -> int:
    """Return the side of the square that query number `query`, from 0, changes."""
    share = p / 2.0 ** sum(query > at for at in HALVINGS)
    return min(max(round(math.sqrt(share * height * width)), 1), height, width)


def stripes(like: Tensor, noise: KeyedNoise) -> Tensor:
    """Return vertical stripes of ±1, one sign a channel and column, shaped as `like`."""
    return _signs(noise.uniform(0, like[:, :, :1, :])).expand_as(like)


def squares(like: Tensor, size: int, query: int, noise: KeyedNoise) -> Tensor:
    """Return ±1 in one square of `size` pixels an image, one sign a channel, and 0 elsewhere."""
    b, c, h, w = like.shape
    draws = noise.uniform(query + 1, like.new_empty(b, c + 2, 1, 1))
    inside = _interval(draws[:, 0], h, size)[:, :, None] & _interval(draws[:, 1], w, size)[:, None]
    return _signs(draws[:, 2:]) * inside[:, None].to(like)


def _interval(draw: Tensor, length: int, size: int) -> Tensor:
    """Return which of `length` places lie in an interval at random, bool `[b, length]`."""
    first = (draw.flatten() * (length - size + 1)).floor()[:, None]
    place = torch.arange(length, device=draw.device)
    return (place >= first) & (place < first + size)


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform)


class Incumbent(NamedTuple):
    """The best of a search so far: images `[b, C, H, W]`, their losses `[b]`, their noise's keys
    `[b]`.
    """

    x: Tensor
    loss: Tensor
    keys: Tensor

    def of(self, stands: Tensor) -> Incumbent:
        """Return the incumbents of these images alone."""
        return Incumbent(*(values[stands] for values in self))

    def challenge(self, x: Tensor, loss: Tensor) -> Incumbent:
        """Return the better of the incumbents and the challengers."""
        better = loss > self.loss
        return self._replace(
            x=torch.where(per_image(better), x, self.x), loss=torch.where(better, loss, self.loss)
        )


@dataclass(frozen=True, kw_only=True)
class Square(DirectCall):
    """Random search by squares (Andriushchenko et al. 2020, algorithms 1 and 2), in Linf.

    From stripes of ±eps on, every query changes one square of the incumbent by ±2·eps a channel
    and keeps it where the loss over the replicates rises. An incumbent kept for its luck would
    stop the search of a random defense; so it is seen afresh now and then. Squares are drawn an
    image, not a batch.

    Attributes:
        threat: what may change; its norm must be Linf.
        steps: queries after the first, 0 or more.
        replicates: purifications an image and query, at least 1.
        loss: what is maximised.
        p: share of the pixels in the first squares, in (0, 1]; halved after 10, 50, 200, 500,
            1,000, 2,000, 4,000, 6,000 and 8,000 queries, as in AutoAttack.
        rescale: stretch or shrink that schedule from 10,000 queries to `steps`.
        review: queries after which a random defense's incumbent is seen afresh, at least 1; more
            than `steps` for never.

    Returns the images that the replicates find wrong on average, or else of the highest loss.

    Raises:
        UsageError: a setting out of range, another norm, or a loss that needs targets.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 5000
    replicates: int = 20
    loss: Loss = field(default_factory=Margin)
    p: float = 0.8
    rescale: bool = False
    review: int = 50

    def __post_init__(self) -> None:
        check_budget(self.steps, self.replicates)
        check_positive("review", self.review)
        refuse_targeted(self.loss, self.name)
        if self.threat.norm != "Linf":
            raise UsageError(f"Square attacks in Linf, not in {self.threat.norm}.")
        if not 0 < self.p <= 1:
            raise UsageError(f"Square's p must be above 0 and at most 1, not {self.p}.")

    @property
    def name(self) -> str:
        return attack_name("Square", self.loss, self.steps)

    @property
    def direct(self) -> Square:
        return self

    @property
    def looks(self) -> int:
        return 1 + self.steps + self._reviews

    @property
    def _reviews(self) -> int:
        return max(self.steps - 1, 0) // self.review

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        draws = len(attack_replicates(self.replicates, defense))
        again = self._reviews if defense.purifier.stochastic else 0
        return (1 + self.steps + again) * draws * defense.purifier.chain_steps

    def run(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
        judge: Judge = lenient,
    ) -> Tensor:
        hearing = Hearing(
            defense,
            images,
            labels,
            ids=ids,
            seed=seed,
            judge=judge,
            replicates=self.replicates,
        )
        if not hearing.over:
            self._search(hearing)
        return hearing.found

    def _search(self, hearing: Hearing) -> None:
        incumbent = self._first(hearing)
        for query in range(self.steps):
            if hearing.random and query and query % self.review == 0 and not hearing.over:
                seen = self._look(hearing, incumbent.x)
                incumbent = incumbent.of(seen.stands)._replace(loss=seen.loss)
            if hearing.over:
                return
            x = self._challenger(hearing, incumbent, query)
            seen = self._look(hearing, x)
            incumbent = incumbent.of(seen.stands).challenge(x[seen.stands], seen.loss)

    def _first(self, hearing: Hearing) -> Incumbent:
        """Look at the stripes."""
        noise, origin = hearing.noise("squares"), hearing.originals
        x = self.threat.project(origin + self.threat.eps * stripes(origin, noise), origin)
        seen = self._look(hearing, x)
        return Incumbent(x[seen.stands], seen.loss, noise.keys[seen.stands])

    def _challenger(self, hearing: Hearing, incumbent: Incumbent, query: int) -> Tensor:
        """Return the incumbents with one square changed."""
        x = incumbent.x
        size = self._side(query, x)
        change = 2.0 * self.threat.eps * squares(x, size, query, KeyedNoise(incumbent.keys))
        return self.threat.project(x + change, hearing.originals)

    def _side(self, query: int, x: Tensor) -> int:
        scaled = int(query / self.steps * SCHEDULED) if self.rescale else query
        return side(scaled, self.p, x.shape[2], x.shape[3])

    def _look(self, hearing: Hearing, x: Tensor) -> Seen:
        seen = hearing.look(x, self.loss)
        hearing.keep(x[seen.stands], seen)
        return seen
