"""Recovery likelihood: an energy learns to bring images back from noise (Gao et al. 2021).

Given x̃ = x + σz, the clean image has the energy U(x)/T + ‖x̃ − x‖²/(2σ²), which is nearly one bowl
where σ is small: short chains from x̃ sample it, and the energy that makes data likely there is the
data's own, whatever σ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ebm_defense.engine import Energy, EnergyGradient, prepare
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.langevin import LangevinSettings, chain_precision, run_chain
from ebm_defense.learning.draws import Batch
from ebm_defense.learning.energies.objectives import Estimate, Measured, Stateless
from ebm_defense.learning.energies.score_matching import level_of
from ebm_defense.noise import Noise


class Tethered:
    """∇ of U(x) + T·‖x̃ − x‖²/(2σ²): an energy's gradient, and the pull to a noisy image.

    Args:
        gradient: ∇U.
        noisy: x̃ `[b, C, H, W]`.
        pull: T/σ², in units of the energy.
    """

    signature = None  # where it pulls to is no weight that graphs know

    def __init__(self, gradient: EnergyGradient, noisy: Tensor, pull: float) -> None:
        self.gradient, self.reads = gradient, gradient.reads
        self.noisy, self.pull = noisy, pull

    def __call__(self, x: Tensor) -> Tensor:
        return self.gradient(x) + self.pull * (x - self.noisy)

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (energy, slope), apart = self.gradient.with_energy(x), x - self.noisy
        tether = 0.5 * self.pull * apart.square().flatten(1).sum(1)
        return energy + tether, slope + self.pull * apart


def recover(
    noisy: Tensor,
    noise: Noise,
    spread: float,
    *,
    energy: Energy,
    settings: LangevinSettings,
    gradient: EnergyGradient | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Sample clean images given noisy ones, p(x | x̃) (Gao et al. 2021, section 3.1).

    Args:
        noisy: x̃ `[b, C, H, W]` in [-1, 1] units, where the chains begin.
        noise: of the chains.
        spread: σ > 0 of the noise on x̃, in [-1, 1] units.
        energy: U.
        settings: of the chains; the step size should be well below σ.
        gradient: ∇U, where it is prepared already.
        precision: of the energy's inner activations, one of `PRECISIONS`.
    """
    resolved = chain_precision(precision, noisy, settings)
    own = gradient or prepare(energy, noisy, resolved)
    tethered = Tethered(own, noisy, settings.temperature / spread**2)
    return run_chain(noisy, noise, energy=energy, settings=settings, gradient=tethered)


class RecoveryLikelihood(Stateless):
    """(mean U(x) − mean U(x⁻))/T with x⁻ drawn from p(x | x̃) by K steps from x̃ (Gao et al. 2021).

    A level is drawn for every image. Gao et al. learn an energy for each level, of which the first
    is the data's; here all levels teach that one.

    Args:
        levels: standard deviations σ > 0 of the noise, in [-1, 1] units.
        langevin: steps K, temperature, and the step size at the largest level; at others it is
            smaller in proportion.
        data_noise: standard deviation of the noise on data, in [-1, 1] units.
        precision: of the chains' inner activations, one of `PRECISIONS`, unchecked.
    """

    def __init__(
        self,
        levels: Sequence[float],
        langevin: LangevinSettings,
        data_noise: float,
        precision: str = "fastest",
    ) -> None:
        self.levels, self.langevin = tuple(levels), langevin
        self.data_noise, self.precision = data_noise, precision

    def estimate(self, energy: nn.Module, batch: Batch) -> Estimate:
        x, spread = batch.noisy(self.data_noise), level_of(batch, self.levels)
        noisy = x + spread * batch.draws.normal("recovery noise", x)
        ends, strength = self.sample(energy, noisy, spread, batch)
        self.ends = ends
        positive, negative = energy(torch.cat([x, ends])).tensor_split(2)
        difference = (positive.mean() - negative.mean()) / self.langevin.temperature
        return Estimate(difference, difference.detach(), strength, ends.abs().max())

    def sample(
        self, energy: nn.Module, noisy: Tensor, spread: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return clean images drawn given noisy ones, and the mean drift a step.

        Args:
            energy: U.
            noisy: x̃ `[b, C, H, W]`.
            spread: their levels `[b, 1, 1, 1]`.
            batch: whose chains' noise is taken.
        """
        ends, strength = noisy.clone(), noisy.new_zeros(())
        noise = batch.draws.noise("chains")
        precision = chain_precision(self.precision, noisy, self.langevin)
        # A chain is of one energy: dropout or batch statistics would make it another every step.
        with in_eval_mode(modules_of(energy)):
            for level in self.levels:
                rows = (spread.flatten() == torch.tensor(level).to(spread)).nonzero()[:, 0]
                if not len(rows):
                    continue
                settings = self._settings(level)
                gradient = Measured(prepare(energy, noisy[rows], precision))
                ends[rows] = recover(
                    noisy[rows], replace(noise, keys=noise.keys[rows]), level,
                    energy=energy, settings=settings, gradient=gradient,
                )  # fmt: skip
                share = len(rows) / len(noisy)
                strength = strength + share * gradient.strength * settings.drift
        return ends, strength

    def _settings(self, level: float) -> LangevinSettings:
        size = self.langevin.step_size * level / max(self.levels)
        return replace(self.langevin, step_size=size)

    def lifetime(self) -> float:
        return self.langevin.steps
