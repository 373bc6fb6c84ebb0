"""Auto-PGD, untargeted and targeted, with every quantity a mean over replicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.attacks.checks import check_budget, check_positive
from ebm_defense.attacks.gradients.base import Gradient, Identity
from ebm_defense.attacks.losses import (
    CrossEntropy,
    Loss,
    TargetedDLR,
    TargetedLoss,
    refuse_targeted,
    takes_targets,
)
from ebm_defense.attacks.optimisers.apgd_rules import (
    MOMENTUM,
    RULES,
    Rule,
    begin,
    refresh,
    reviews,
    take_note,
)
from ebm_defense.attacks.optimisers.ascent import (
    attack_name,
    start,
    without_purifier,
)
from ebm_defense.attacks.session import AttackSession, QueryResult, SessionAttack
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

Aim = Callable[[Tensor], Loss]
"""The loss for these rows of the batch."""


@dataclass(frozen=True, kw_only=True)
class AutoPGD(SessionAttack):
    """The ascent of Croce and Hein (2020, 2021), which chooses its own steps, per image.

    In Linf and L2 it has momentum and halves its steps; in L1 its steps are sparse, and grow
    sparser with the best point: see `RULES`.

    Attributes:
        threat: what may change.
        steps: gradient steps, 0 or more.
        replicates: purifications an image and step, at least 1.
        gradient: how the defense is differentiated.
        restarts: runs, each from a random start of its own, at least 1.
        review: the best point is seen afresh at the first check that is so many steps after the
            last time, at least 1; more than `steps` for never.

    Returns the images that the replicates find wrong on average, or else of the highest loss.

    Raises:
        UsageError: a setting out of range, or a loss that does not fit.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 100
    replicates: int = 20
    gradient: Gradient = field(default_factory=Identity)
    restarts: int = 1
    review: int = 10

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_budget(self.steps, self.replicates, self.restarts)
        check_positive("review", self.review)

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def direct(self) -> Self:
        return replace(self, gradient=without_purifier(self.gradient))

    @property
    def runs(self) -> int:
        """How many ascents there are at most."""
        return self.restarts

    @property
    def looks(self) -> int:
        return self.runs * (self.steps + 1 + len(self._reviews))

    @property
    def _rule(self) -> Rule:
        return RULES.get(self.threat.norm, MOMENTUM)

    @property
    def _reviews(self) -> list[int]:
        """After which steps a random defense's best point is seen afresh."""
        return reviews(self._rule.checks(self.steps), self.review)

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        draws = len(attack_replicates(self.replicates, defense))
        again = len(self._reviews) if defense.stochastic else 0
        climbing = (self.steps + again) * self._source.chain_steps(defense, draws)
        return self.runs * (climbing + self._query_steps(defense))

    def _query_steps(self, defense: PurifiedClassifier) -> int:
        """Return the chain-steps of a query of one image without a gradient."""
        return len(attack_replicates(self.replicates, defense)) * defense.purifier.chain_steps

    def pursue(self, session: AttackSession) -> None:
        for number, aim in enumerate(self._aims(session)):
            if not session.over:
                self._climb(session, number, aim)

    def _aims(self, session: AttackSession) -> Iterator[Aim]:
        """Yield the loss of each run."""
        raise NotImplementedError

    def _climb(self, session: AttackSession, number: int, aim: Aim) -> None:
        """Run one ascent, for the images that stand."""
        rule, eps = self._rule, self.threat.eps
        checks, again = rule.checks(self.steps), self._reviews if session.random else []
        x = start(session, self.threat, number, random=True)
        seen = self._query(session, x, aim, last=self.steps == 0)
        climb = begin(x[seen.stands], seen, rule.first * eps)
        for step in range(1, self.steps + 1):
            if session.over:
                return
            climb = rule.advance(climb, session.originals, self.threat, step)
            seen = self._query(session, climb.x, aim, last=step == self.steps)
            climb = climb.of(seen.stands)
            climb = take_note(climb, self._blend(seen, climb.gradient, step))
            if step in checks:
                climb = rule.check(climb, session.originals, eps, checks[step])
            if step in again and not session.over:
                seen = self._query(session, climb.best, aim)
                climb = refresh(climb.of(seen.stands), seen)

    def _query(
        self, session: AttackSession, x: Tensor, aim: Aim, last: bool = False
    ) -> QueryResult:
        seen = session.query(x, aim(session.rows), None if last else self._source)
        session.keep(x[seen.stands], seen)
        return seen

    @property
    def _source(self) -> Gradient:
        """Where gradients come from."""
        return self.gradient

    def _blend(self, seen: QueryResult, earlier: Tensor, step: int) -> QueryResult:
        """Return what was seen, its gradient mixed with the earlier one if an attack does so."""
        return seen


@dataclass(frozen=True, kw_only=True)
class APGD(AutoPGD):
    """Auto-PGD (Croce and Hein 2020) on a loss over replicates.

    On a random defense every loss, gradient and best point is a mean over the replicates. The
    best of many noisy losses is also the luckiest, and would stop the ascent; so it is seen
    afresh now and then, on new noise, and its loss and gradient replaced. On a deterministic
    defense nothing is seen twice, and the attack is the published one step by step: in L1 the
    single-eps one of Croce and Hein (2021).

    Attributes:
        loss: what is maximised.
    """

    loss: Loss = field(default_factory=CrossEntropy)

    kind: ClassVar[str] = "APGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_targeted(self.loss, self.name)

    @property
    def name(self) -> str:
        return attack_name(self.kind, self.loss, self.steps, self.restarts)

    def _aims(self, session: AttackSession) -> Iterator[Aim]:
        for _ in range(self.restarts):
            yield lambda rows: self.loss


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD(AutoPGD):
    """Auto-PGD towards one wrong class after the other (Croce and Hein 2020, section 5).

    The targets are the classes whose logits, averaged over the replicates of one query of the
    image itself, are the highest but for the true one's. Restarts are runs for each target.

    Attributes:
        targets: classes to try, at least 1; a model with fewer wrong classes has fewer.
        loss: a loss that takes targets.
    """

    loss: TargetedLoss = field(default_factory=TargetedDLR)
    targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not takes_targets(self.loss):
            raise UsageError("TargetedAPGD needs a loss that takes targets, as TargetedDLR().")
        if self.targets < 1:
            raise UsageError(f"a targeted attack needs at least 1 target, not {self.targets}.")

    @property
    def name(self) -> str:
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"APGD-T-{self.steps}, {self.targets} targets{restarts}"

    @property
    def runs(self) -> int:
        return self.targets * self.restarts

    @property
    def looks(self) -> int:
        return 1 + super().looks

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        return self._query_steps(defense) + super().chain_steps(defense)

    def _aims(self, session: AttackSession) -> Iterator[Aim]:
        if session.over:
            return
        ranked = self._rank(session)
        for target in range(min(self.targets, ranked.shape[1] - 1)):
            for _ in range(self.restarts):
                yield self._towards(ranked[:, target])

    def _towards(self, targets: Tensor) -> Aim:
        return lambda rows: partial(self.loss, targets=targets[rows])

    def _rank(self, session: AttackSession) -> Tensor:
        """Query the images and return their classes `[n, classes]`, the likeliest wrong first."""
        count = len(session.found)
        seen = session.query(session.originals, CrossEntropy())
        mean = seen.logits.mean(0)
        wrong = mean.scatter(1, session.labels[:, None], -torch.inf)
        ranked = session.labels.new_zeros(count, mean.shape[1])
        ranked[session.rows] = wrong.argsort(dim=1, descending=True)
        return ranked
