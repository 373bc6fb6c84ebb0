"""How a whole defense is learned, as frozen settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.learning.defenses.objectives import Objective
from ebm_defense.learning.energies.likelihood import Likelihood
from ebm_defense.learning.energies.robust import refuse_other

LEARNS = ("energy", "classifier", "both")


@dataclass(frozen=True, kw_only=True)
class DefenseRecipe:
    """How a defense is learned against attacks on its input (Madry et al. 2018).

    Attributes:
        learn: what learns: "energy" (classifiers stay as they are, batch statistics included),
            "classifier" or "both".
        updates: weight updates in all.
        eps: of the attacks, in [0, 1] units; 0 for ordinary training.
        attack_steps: gradient steps of the attacks, one number for each of so many equal stages.
        draws: replicates a prediction averages, in the attack and in the loss.
        objective: the loss.
        reconstruction: α ≥ 0: adds α times the mean squared distance of purified attacked images
            from the originals, in [0, 1] units, so that they are images to any classifier.
        reconstruction_shape: α of Barron's robust loss in place of that square, at most 2, which is
            the square; it is the square near 0 whatever α.
        reconstruction_scale: its c > 0, in [0, 1] units.
        likelihood: what maximum likelihood adds; None for nothing.
        lr: AdamW's highest learning rate, that of the energy and its chain.
        classifier_lr: that of the classifier.
        weight_decay: AdamW's, of the classifier alone.
        warmup: the share of all updates over which the rates rise, before a cosine.
        eps_rise: the share over which eps rises from a third.
        clip: the largest norm of a gradient.
        average: decay of the weights' running average, which is validated and kept; it rises to
            this from 0.
        validate_every: updates between two validations; None for an epoch.
        validation_steps: gradient steps of the validation's attack.
        validation_draws: replicates that judge it.
        seed: seed of every draw.
    """

    learn: str = "energy"
    updates: int = 10_000
    eps: float = 0.1
    attack_steps: tuple[int, ...] = (1, 1, 2, 2, 2)
    draws: int = 1
    objective: Objective = field(default_factory=Objective)
    reconstruction: float = 0.0
    reconstruction_shape: float = 2.0
    reconstruction_scale: float = 0.1
    likelihood: Likelihood | None = None
    lr: float = 3e-3
    classifier_lr: float = 2e-3
    weight_decay: float = 0.02
    warmup: float = 0.03
    eps_rise: float = 0.05
    clip: float = 1.0
    average: float = 0.998
    validate_every: int | None = None
    validation_steps: int = 10
    validation_draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.learn not in LEARNS:
            raise UsageError(f"learn is {self.learn!r}; choose one of {', '.join(LEARNS)}.")
        counts = (self.updates, self.draws, self.validation_steps, self.validation_draws)
        if min(*counts, self.validate_every or 1) < 1:
            raise UsageError("updates, draws and the validation's numbers must be at least 1.")
        if not self.attack_steps or min(self.attack_steps) < 1:
            raise UsageError(f"attack_steps are 1 or more each, not {self.attack_steps}.")
        if not (min(self.lr, self.classifier_lr, self.clip) > 0 and self.weight_decay >= 0):
            raise UsageError("learning rates and clip must be above 0, weight_decay 0 or more.")
        if not 0 <= self.reconstruction < float("inf"):
            raise UsageError(f"reconstruction must be 0 or more, not {self.reconstruction}.")
        refuse_other(self.reconstruction_shape, self.reconstruction_scale)
        if not (self.eps >= 0 and 0 <= self.average < 1):
            raise UsageError(f"eps must be 0 or more and average in [0, 1), not {self.eps}.")
        if not (0 <= self.warmup < 1 and 0 <= self.eps_rise < 1):
            raise UsageError("warmup and eps_rise must lie in [0, 1).")
        if self.likelihood is not None and self.learn == "classifier":
            raise UsageError("a likelihood is an energy's, but the classifier alone learns.")

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, as a share of the highest."""
        share = (update + 1) / self.updates
        rise = share / self.warmup if share < self.warmup else 1.0
        return rise * 0.5 * (1.0 + math.cos(math.pi * update / self.updates))

    def eps_at(self, update: int) -> float:
        """Return eps at an update."""
        share = update / self.updates
        risen = share / self.eps_rise if share < self.eps_rise else 1.0
        return self.eps * (1.0 + 2.0 * risen) / 3.0

    def steps_at(self, update: int) -> int:
        """Return the attack's gradient steps at an update."""
        stages = len(self.attack_steps)
        return self.attack_steps[min(update * stages // self.updates, stages - 1)]
