"""How generators, encoders and energies are learned, as frozen settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.langevin import LangevinSettings


def _chain(steps: int, step_size: float, temperature: float = 1.0) -> LangevinSettings:
    return LangevinSettings(steps=steps, step_size=step_size, temperature=temperature)


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """How a generator, its encoder and an energy are learned.

    Attributes:
        updates: weight updates in all.
        batch: data images, and chains, an update.
        sigma: σ > 0 of images around G(z), in [-1, 1] pixel units.
        prior: short-run chains of the latent prior, from N(0, I).
        posterior: short-run chains of latents of an image; also those that purify by latents.
        image: chains in image space, of density exp(−E/T); its temperature T is the energy's unit.
        latent_step_size: of the latents in chains of both, ≥ 0.
        flow_time: of the flow along composed attributes, > 0; it takes the posterior's steps.
        magnitude: ≥ 0, weight of the mean squared energy, in units of T, where nothing else bounds
            an image energy.
        lr: Adam's highest learning rate of generator and encoder.
        energy_lr: that of the energy.
        clip: the largest norm of a network's gradient.
        average: decay of the weights' running average, the weights that are kept.
        seed: seed of every draw.
    """

    updates: int = 3_000
    batch: int = 100
    sigma: float = 0.3
    prior: LangevinSettings = field(default_factory=lambda: _chain(60, 0.4))
    posterior: LangevinSettings = field(default_factory=lambda: _chain(20, 0.1))
    image: LangevinSettings = field(default_factory=lambda: _chain(20, 0.05))
    latent_step_size: float = 0.05
    flow_time: float = 1.0
    magnitude: float = 0.01
    lr: float = 1e-3
    energy_lr: float = 2e-4
    clip: float = 10.0
    average: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if min(self.updates, self.batch) < 1:
            raise UsageError("updates and batch must be at least 1.")
        if not min(self.sigma, self.lr, self.energy_lr, self.clip, self.flow_time) > 0:
            raise UsageError("sigma, learning rates, clip and flow_time must be above 0.")
        if not (self.latent_step_size >= 0 and self.magnitude >= 0 and 0 <= self.average < 1):
            raise UsageError(
                "latent_step_size and magnitude must be 0 or more, and average in [0, 1)."
            )
