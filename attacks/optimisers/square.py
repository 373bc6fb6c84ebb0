"""The Square attack: random search by squares, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.attacks.checks import check_budget, check_positive
from ebm_defense.attacks.losses import Loss, Margin, refuse_targeted
from ebm_defense.attacks.norms import per_image
from ebm_defense.attacks.optimisers.ascent import attack_name
from ebm_defense.attacks.optimisers.square_proposals import PROPOSALS, Proposals
from ebm_defense.attacks.session import AttackSession, QueryResult, SessionAttack
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, working_dtype

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
SCHEDULED = 10_000  # queries that the halvings were made for


def width(query: int, p: float, pixels: int) -> int:
    """Return how wide a square query number `query`, from 0, would change in so many pixels."""
    share = p / 2.0 ** sum(query > at for at in HALVINGS)
    return round(math.sqrt(share * pixels))


def _exact(x: Tensor) -> Tensor:
    """Return x in the precision in which it is computed with."""
    return x.to(working_dtype(x.dtype))


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
class Square(SessionAttack):
    """Random search by squares (Andriushchenko et al. 2020, algorithm 1).

    From a first perturbation on, every query changes the incumbent in a square and keeps that
    where the loss over the replicates rises; how, `PROPOSALS` says for each norm. An incumbent
    kept for its luck would stop the search of a random defense; so it is seen afresh now and then.
    Squares are drawn an image, not a batch.

    Attributes:
        threat: what may change, in a norm of `PROPOSALS`.
        steps: queries after the first, 0 or more.
        replicates: purifications an image and query, at least 1.
        loss: what is maximised.
        p: share of the pixels in the first squares, in (0, 1]; halved after 10, 50, 200, 500,
            1,000, 2,000, 4,000, 6,000 and 8,000 queries, as in AutoAttack. In L2 and L1 sides are
            odd and 3 or more.
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
        plain_numbers(self)
        check_budget(self.steps, self.replicates)
        check_positive("review", self.review)
        refuse_targeted(self.loss, self.name)
        if self.threat.norm not in PROPOSALS:
            raise UsageError(
                f"Square has no moves in {self.threat.norm}, only in {', '.join(PROPOSALS)}."
            )
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
        again = self._reviews if defense.stochastic else 0
        return (1 + self.steps + again) * draws * defense.purifier.chain_steps

    def pursue(self, session: AttackSession) -> None:
        if session.over:
            return
        incumbent = self._first(session)
        for query in range(self.steps):
            if session.random and query and query % self.review == 0 and not session.over:
                seen = self._query(session, incumbent.x)
                incumbent = incumbent.of(seen.stands)._replace(loss=seen.loss)
            if session.over:
                return
            x = self._challenger(session, incumbent, query)
            seen = self._query(session, x)
            incumbent = incumbent.of(seen.stands).challenge(x[seen.stands], seen.loss)

    def _first(self, session: AttackSession) -> Incumbent:
        """Query the first perturbation."""
        noise, origin = session.noise("squares"), session.originals
        delta = self._proposals.first(_exact(origin), self.threat.eps, noise)
        x = self.threat.project(origin + delta, origin)
        seen = self._query(session, x)
        return Incumbent(x[seen.stands], seen.loss, noise.keys[seen.stands])

    def _challenger(self, session: AttackSession, incumbent: Incumbent, query: int) -> Tensor:
        """Return the incumbents with one square changed."""
        origin, noise = session.originals, KeyedNoise(incumbent.keys)
        delta, side = _exact(incumbent.x) - _exact(origin), self._side(query, origin)
        # Draws of number 0 are those of the first perturbation.
        changed = self._proposals.change(delta, side, self.threat.eps, query + 1, noise)
        return self.threat.project(origin + changed, origin)

    @property
    def _proposals(self) -> Proposals:
        return PROPOSALS[self.threat.norm]

    def _side(self, query: int, x: Tensor) -> int:
        scaled = int(query / self.steps * SCHEDULED) if self.rescale else query
        pixels = x.shape[2:].numel()
        return self._proposals.side(width(scaled, self.p, pixels), *x.shape[2:])

    def _query(self, session: AttackSession, x: Tensor) -> QueryResult:
        seen = session.query(x, self.loss)
        session.keep(x[seen.stands], seen)
        return seen
