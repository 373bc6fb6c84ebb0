"""How an energy is learned, as frozen settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.robust import refuse_other


@dataclass(frozen=True, kw_only=True)
class EnergyRecipe:
    """How an energy is learned (Hill, Mitchell, Zhu 2021; Hill et al. 2022 for rejuvenation).

    Attributes:
        updates: weight updates in all.
        objective: what moves the weights, a name in `OBJECTIVES`.
        batch: data images and chains an update, at most `bank`.
        accumulate: into how many parts a batch is cut, for the sake of memory.
        langevin: steps K, step size and temperature of the chains between two updates.
        data_noise: σ of the noise on training images, in [-1, 1] units.
        noise_levels: standard deviations of the noise that score matching and recovery likelihood
            undo, in [-1, 1] units.
        loss_shape: α of Barron's robust loss of what score matching regresses, at most 2, which is
            half the square; or "adaptive", to be learned.
        loss_scale: its c > 0, in standard deviations of the noise; where an adaptive one begins.
        start: where chains begin, a name in `STARTS`.
        fresh: where the chains of a bank begin, and begin again, likewise.
        bank: persistent chains, for the starts "persistent" and "burn-in".
        rejuvenation: probability that a visited chain starts afresh, for the start "persistent".
        most_visits: visits after which such a chain starts afresh in any case; None for no end.
        burn_in: chains that burn in before learning sees them, for the start "burn-in".
        burn_in_visits: visits until one has burnt in.
        generator_lr: learning rate of a cooperative generator.
        adam_lr, final_lr: Adam's learning rate falls from the first to the second by a cosine.
        drops: updates from which Adam's rate falls to a tenth, in place of the cosine.
        sgd_from: the update from which plain SGD takes over, 0 or more; None for Adam throughout.
        sgd_lr: SGD's learning rate, in units of the temperature.
        average: decay of the weights' running average, the weights that are kept.
        limit: the size of d_s beyond which learning counts as diverged.
        setbacks: how often a divergence leads back to the last saved state with half the rate.
        seed: seed of every draw.
    """

    updates: int = 10_000
    objective: str = "likelihood"
    batch: int = 100
    accumulate: int = 1
    langevin: LangevinSettings = field(default_factory=lambda: LangevinSettings(steps=20))
    data_noise: float = 0.02
    noise_levels: tuple[float, ...] = (0.1,)
    loss_shape: float | str = 2.0
    loss_scale: float = 1.0
    start: str = "persistent"
    fresh: str = "data"
    bank: int = 10_000
    rejuvenation: float = 0.05
    most_visits: int | None = None
    burn_in: int = 1_000
    burn_in_visits: int = 750
    generator_lr: float = 2e-4
    adam_lr: float = 1e-4
    final_lr: float = 1e-5
    drops: tuple[int, ...] = ()
    sgd_from: int | None = None
    sgd_lr: float = 5e-5
    average: float = 0.999
    limit: float = 1e4
    setbacks: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not 1 <= self.batch <= self.bank or not 1 <= self.accumulate <= self.batch:
            raise UsageError(
                f"batch must be between 1 and the bank's {self.bank}, not {self.batch}, and "
                f"accumulate between 1 and the batch, not {self.accumulate}."
            )
        if not 0 <= self.rejuvenation <= 1 or not 0 <= self.average < 1:
            raise UsageError("rejuvenation must lie in [0, 1] and average in [0, 1).")
        if self.langevin.steps < 1:
            raise UsageError("the Langevin steps between two updates must be at least 1.")
        if self.updates < 1 or (self.sgd_from is not None and self.sgd_from < 0):
            raise UsageError("updates must be at least 1 and sgd_from 0 or more.")
        visits = (self.burn_in, self.burn_in_visits, self.most_visits or 1)
        if min(visits) < 1 or self.most_visits == 0 or self.setbacks < 0:
            raise UsageError(
                "burn_in, burn_in_visits and most_visits must be at least 1, setbacks 0 or more."
            )
        refuse_other(self.loss_shape, self.loss_scale)
        if not self.noise_levels or not all(0 < s < math.inf for s in self.noise_levels):
            raise UsageError(f"noise_levels are one or more above 0, not {self.noise_levels}.")
        if not (self.data_noise >= 0 and min(self.limit, self.generator_lr) > 0):
            raise UsageError("data_noise must be 0 or more, limit and generator_lr above 0.")

    def rate(self, update: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        if self.sgd_from is not None and update >= self.sgd_from:
            return self.sgd_lr * self.langevin.temperature
        if self.drops:
            return self.adam_lr * 0.1 ** sum(update >= drop for drop in self.drops)
        share = update / (self.sgd_from or self.updates)
        cosine = 0.5 * (1.0 + math.cos(math.pi * share))
        return self.final_lr + (self.adam_lr - self.final_lr) * cosine
