"""A short Langevin chain that is learned: energy, and on request step size and noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ebm_defense.engine.differentiable import differentiable_gradient
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.noise import Noise
from ebm_defense.precision.names import resolve_precision
from ebm_defense.purifiers import LangevinPurifier, Purifier


class LearnedChain(Purifier):
    """x ← x − s·∇U(x) + σ·z, K times, differentiable by images, weights, s and σ.

    It is the chain of a `LangevinPurifier` with ε = σ and T = σ²/(2s), see `settings`; that one
    runs it where nothing is learned.

    Args:
        energy: the network, `[N, C, H, W]` in [-1, 1] to `[N]`.
        settings: steps, and where step size and temperature begin.
        learn_drift: whether s is learned.
        learn_noise: whether σ is learned.
        precision: of the energy's inner activations, one of `langevin.PRECISIONS`.
        compiled: let torch compile the activations, which needs a C++ compiler on a CPU.

    Raises:
        UsageError: adjusted chains.
    """

    differentiable = True

    def __init__(
        self,
        energy: nn.Module,
        settings: LangevinSettings,
        *,
        learn_drift: bool = False,
        learn_noise: bool = False,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        super().__init__()
        if settings.adjusted:
            raise UsageError(
                "a chain that is learned takes every step, for a Metropolis test has no gradient; "
                "give it settings that are not adjusted."
            )
        self.energy, self.steps = energy, settings.steps
        self.log_drift = _logarithm(settings.drift, learn_drift)
        self.log_noise = _logarithm(settings.step_size, learn_noise)
        self.precision, self.compiled = precision, compiled

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.steps

    @property
    def settings(self) -> LangevinSettings:
        """The chain as it is now, for a `LangevinPurifier`."""
        drift, noise = (math.exp(p.item()) for p in (self.log_drift, self.log_noise))
        return LangevinSettings(
            steps=self.steps, step_size=noise, temperature=noise**2 / (2.0 * drift)
        )

    def fixed(self) -> LangevinPurifier:
        """Return the purifier that runs what was learned, on the CPU."""
        s, energy = self.settings, self.energy.cpu().requires_grad_(False)
        return LangevinPurifier(energy, s.steps, s.step_size, s.temperature)

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        precision = resolve_precision(self.precision, images.device, images.dtype)
        gradient = differentiable_gradient(self.energy, precision, compiled=self.compiled)
        drift, spread = self.log_drift.exp(), self.log_noise.exp()
        x = images * 2.0 - 1.0
        for step in range(self.steps):
            x = x - drift * gradient(x) + spread * noise.normal(step, x)
        return (x + 1.0) / 2.0


def _logarithm(value: float, learned: bool) -> nn.Parameter:
    return nn.Parameter(torch.tensor(math.log(value)), requires_grad=learned)
