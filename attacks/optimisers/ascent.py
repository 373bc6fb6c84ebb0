"""Projected ascent on a loss over replicates: one loop for every rule of motion."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.attacks.checks import check_budget, check_positive
from ebm_defense.attacks.gradients.base import Gradient, Identity, VjpGradient
from ebm_defense.attacks.losses import CrossEntropy, Loss, loss_name, refuse_targeted
from ebm_defense.attacks.session import AttackSession, SessionAttack
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.interface.numbers import plain_numbers

USUAL = {"PGD": "CE", "Square": "CW", "SPSA": "CW", "DiffHammer": "CW"}
Memory = tuple[Tensor, ...]
"""What a rule of motion remembers of each image, every tensor `[b, …]`."""


@dataclass(frozen=True, kw_only=True)
class Ascent(SessionAttack):
    """A gradient, a loss, and a rule of motion that a subclass gives.

    Attributes:
        threat: what may change.
        steps: gradient steps, 0 or more; 0 proposes the start alone.
        step_size: length of a step, above 0, in [0, 1] units.
        replicates: purifications an image and step, at least 1.
        gradient: how the defense is differentiated.
        loss: what is maximised.
        random_start: start at a random point of the ball, not at the image.
        restarts: how often all of this is done, each time on noise of its own, at least 1. Of the
            last iterates the one that the replicates find wrong is returned, or the one of the
            highest loss.

    Raises:
        UsageError: a setting out of range, or a loss that needs targets.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 50
    step_size: float = 2 / 255
    replicates: int = 15
    gradient: Gradient = field(default_factory=Identity)
    loss: Loss = field(default_factory=CrossEntropy)
    random_start: bool = True
    restarts: int = 1

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_budget(self.steps, self.replicates, self.restarts)
        check_positive("step_size", self.step_size)
        refuse_targeted(self.loss, self.name)

    @property
    def name(self) -> str:
        return attack_name(self.kind, self.loss, self.steps, self.restarts)

    @property
    def direct(self) -> Self:
        return replace(self, gradient=without_purifier(self.gradient))

    @property
    def looks(self) -> int:
        return self.restarts * (self.steps + 1)

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        draws = len(attack_replicates(self.replicates, defense))
        climbing = self.steps * self.gradient.chain_steps(defense, draws)
        return self.restarts * (climbing + draws * defense.purifier.chain_steps)

    def remember(self, x: Tensor) -> Memory:
        """Return what the rule remembers at the start `x` `[b, C, H, W]`."""
        return ()

    def move(
        self, x: Tensor, origin: Tensor, gradient: Tensor, memory: Memory, step: int
    ) -> tuple[Tensor, Memory]:
        """Take the step of this number, from 0, and return where it leads, and the memory."""
        raise NotImplementedError

    def pursue(self, session: AttackSession) -> None:
        for restart in range(self.restarts):
            x = start(session, self.threat, restart, self.random_start)
            memory = self.remember(x)
            for step in range(self.steps):
                if session.over:
                    return
                seen = session.query(x, self.loss, self.gradient)
                x, memory = x[seen.stands], tuple(m[seen.stands] for m in memory)
                x, memory = self.move(x, session.originals, seen.gradient, memory, step)
            if not session.over:
                seen = session.query(x, self.loss)
                session.keep(x[seen.stands], seen)


def start(session: AttackSession, threat: ThreatModel, number: int, random: bool) -> Tensor:
    """Return the start of an attack's run of this number, for the images that still stand."""
    if not random:
        return session.originals.clone()
    purpose = f"random start {number}" if number else "random start"
    return threat.random_start(session.originals, session.noise(purpose))


def without_purifier(gradient: Gradient) -> Gradient:
    """Return the same gradient where there is no purifier: every way back is the identity."""
    return Identity() if isinstance(gradient, VjpGradient) else gradient


def attack_name(kind: str, loss: Loss, steps: int, restarts: int = 1) -> str:
    """Return a name for tables, as "PGD-50", "APGD-DLR-100" or "Square-CE-5000 ×3".

    A loss that an attack was published with is not named.
    """
    label = loss_name(loss)
    named = [] if USUAL.get(kind) == label else [label]
    return "-".join([kind, *named, str(steps)]) + (f" ×{restarts}" if restarts > 1 else "")
