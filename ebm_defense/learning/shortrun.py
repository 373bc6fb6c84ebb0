"""What a short-run model can do (Nijkamp et al. 2019, Learning Non-Convergent Short-Run MCMC).

K Langevin steps with their noise held fixed are a map of where a chain starts to where it ends, a
generator: it samples, it interpolates, and an image is reconstructed by the start that leads there,
found by descent through all K steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import Energy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.langevin import LangevinPurifier


class Reconstruction(NamedTuple):
    """Images, the starts that lead nearest to them, and how near.

    Attributes:
        starts: `[n, C, H, W]` in [-1, 1].
        images: what the model makes of them, likewise.
        errors: the mean squared pixel error in [-1, 1] units, `[updates + 1, n]`, the first of
            random starts.
    """

    starts: Tensor
    images: Tensor
    errors: Tensor


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """An energy and the length of its chains, read as a generator x = M(z).

    Attributes:
        energy: maps `[b, C, H, W]` in [-1, 1] to `[b]`.
        settings: K, step size and temperature, as in learning.
        shape: of an image, `(C, H, W)`.
        seed: of starts and noise.
        device: where to compute.
    """

    energy: Energy
    settings: LangevinSettings
    shape: tuple[int, int, int]
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def starts(self, count: int, first: int = 0) -> Tensor:
        """Draw where chains start, uniform in [-1, 1], `[count, C, H, W]`; numbers from `first`."""
        like = torch.empty(count, *self.shape, device=self.device)
        return self._noise("short-run starts", count, first).uniform(0, like) * 2.0 - 1.0

    def noise(self, count: int, first: int = 0) -> KeyedNoise:
        """Return the chains' noise, which depends on their numbers alone."""
        return self._noise("short-run chains", count, first)

    def _noise(self, purpose: str, count: int, first: int) -> KeyedNoise:
        keys = chain_keys(self.seed, purpose, range(first, first + count), range(1))[0]
        return KeyedNoise(keys.to(self.device))

    def __call__(self, starts: Tensor, noise: KeyedNoise | None = None) -> Tensor:
        """Return where chains from `starts` `[n, C, H, W]` end after K steps, likewise."""
        chain = self._chain()
        noise = noise or self.noise(len(starts))
        return chain.advance(starts, noise, range(chain.chain_steps))

    def sample(self, count: int, first: int = 0) -> Tensor:
        """Draw images `[count, C, H, W]` in [-1, 1], numbered from `first`."""
        return self(self.starts(count, first), self.noise(count, first))

    def _chain(self) -> LangevinPurifier:
        s = self.settings
        return LangevinPurifier(
            self.energy, s.steps, s.step_size, s.temperature, "fp32", adjusted=s.adjusted
        )

    def reconstruct(
        self, images: Tensor, *, updates: int = 200, learning_rate: float = 0.05
    ) -> Reconstruction:
        """Find starts whose chains end at images, by Adam through all K steps (section 4.3).

        The gradient goes back by one Hessian-vector product a step, and all states are kept. An
        energy without curvature (LeakyReLU) has the identity's gradient.

        Args:
            images: `[n, C, H, W]` in [-1, 1].
            updates: of the starts.
            learning_rate: Adam's, in [-1, 1] units.

        Raises:
            UsageError: no updates, or a learning rate that is not above 0.
        """
        if updates < 1 or not learning_rate > 0:
            raise UsageError("a reconstruction needs 1 update or more, and a rate above 0.")
        images, noise, chain = images.to(self.device), self.noise(len(images)), self._chain()
        z = self.starts(len(images)).requires_grad_()
        optimiser, errors = torch.optim.Adam([z], lr=learning_rate), []
        for _ in range(updates):
            states = _states(chain, z.detach(), noise)
            apart = states[-1] - images
            errors.append(_error(apart))
            z.grad = _pulled_back(chain, states, noise, apart)
            optimiser.step()
            z.data.clamp_(-1.0, 1.0)  # a start that is drawn lies there
        found = self(z.detach(), noise)
        errors.append(_error(found - images))
        return Reconstruction(z.detach(), found, torch.stack(errors).cpu())

    def interpolate(
        self, first: Tensor, second: Tensor, steps: int, noise: KeyedNoise | None = None
    ) -> Tensor:
        """Return the images of starts between two, z = ρ·z₁ + √(1 − ρ²)·z₂ (section 4.2).

        Args:
            first: starts `[n, C, H, W]`, where ρ is 1.
            second: likewise, where ρ is 0.
            steps: how many in all, the ends included, 2 or more; ρ is the cosine of equal angles.
            noise: of the n chains, the same for all between; the model's own if not given.

        Returns:
            `[steps, n, C, H, W]` in [-1, 1].

        Raises:
            UsageError: fewer than two steps.
        """
        if steps < 2:
            raise UsageError(f"an interpolation has 2 images or more, not {steps}.")
        noise = noise or self.noise(len(first))
        angles = torch.linspace(0.0, torch.pi / 2, steps)
        between = [float(a.cos()) * first + float(a.sin()) * second for a in angles]
        return torch.stack([self(z, noise) for z in between])


def _states(chain: LangevinPurifier, z: Tensor, noise: KeyedNoise) -> list[Tensor]:
    """Return the states before every step, and the last."""
    blocks = [range(k, k + 1) for k in range(chain.chain_steps)]
    return chain.states(z, noise, blocks) if blocks else [z]


def _pulled_back(
    chain: LangevinPurifier, states: list[Tensor], noise: KeyedNoise, cotangent: Tensor
) -> Tensor:
    """Return cotangentᵀ·∂M/∂z, from the last state to the first."""
    prepared, g = chain.prepared_vjp(states[0], "fp32"), cotangent
    for step in reversed(range(len(states) - 1)):
        x = states[step]
        g = chain.vjp_step(g, x, noise, step) if prepared is None else prepared(g, x, None)
    return g


def _error(apart: Tensor) -> Tensor:
    return apart.square().flatten(1).mean(1)
