"""A generator, its encoder and an energy, with their densities and their chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ebm_defense.engine import Energy
from ebm_defense.generators.networks import Encoder, Generator, LatentEnergy
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.learning.draws import Draws
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier
from ebm_defense.purifiers.path import Joint, half_square


class Flat(nn.Module):
    """U(z) = 0: the prior is its base."""

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(len(z))


@dataclass(frozen=True)
class Model:
    """What is learned, or given: G, the encoder q(z | x) and an energy of either or both."""

    generator: Generator
    encoder: Encoder
    energy: nn.Module

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return vars(self)

    def prior_energy(self, z: Tensor) -> Tensor:
        """Return a latent energy U of all layers' latents at z, `[b]`."""
        value: Tensor = self.energy(self.generator.latents(z))
        return value

    def prior(self, draws: Draws, chain: LangevinSettings, stages: int | None = None) -> Tensor:
        """Draw z by a short-run chain of exp(−U(z))·N(z; 0, I) from N(0, I) (Pang et al. 2020).

        Args:
            draws: of the chains.
            chain: steps and step size.
            stages: how many of the energy's stages count; all if not given.
        """
        energy = cast(LatentEnergy, self.energy)
        count = len(energy.stages) if stages is None else stages
        return self._latent_chain(
            draws, chain, lambda z: energy.first(self.generator.latents(z), count)
        )

    def based(self, draws: Draws, chain: LangevinSettings, temperature: float) -> Tensor:
        """Draw z by a chain of exp(−E(G(z))/T)·N(z; 0, I) from N(0, I) (Arbel et al. 2021)."""
        return self._latent_chain(
            draws, chain, lambda z: self.energy(self.generator(z)) / temperature
        )

    def _latent_chain(self, draws: Draws, chain: LangevinSettings, energy: Energy) -> Tensor:
        return run_chain(
            self.latents(draws, "latents"),
            draws.noise("prior chain"),
            energy=lambda z: energy(z) + half_square(z),
            settings=chain,
        )

    def latents(self, draws: Draws, purpose: str) -> Tensor:
        """Draw z from the base N(0, I), `[b, d]`."""
        size = self.generator.settings.size
        return draws.normal(purpose, torch.empty(len(draws.places), size, device=draws.device))

    def posterior(
        self, x: Tensor, start: Tensor, draws: Draws, chain: LangevinSettings, sigma: float
    ) -> Tensor:
        """Move z from `start` by a short-run chain of p(z | x), see `LatentPurifier`.

        Beside an energy of images the prior is its base.
        """
        energy = self.energy if isinstance(self.energy, LatentEnergy) else Flat()
        purifier = LatentPurifier(energy, self.generator, None, chain.steps, chain.step_size, sigma)
        state = {"z": start.detach(), "x": x}
        ends = purifier.advance(state, draws.noise("posterior chain"), range(chain.steps))
        return ends["z"]

    def hat(self, draws: Draws, chain: LangevinSettings, latent_step_size: float) -> Tensor:
        """Draw G(z) + y by chains of Hat EBM from z ~ N(0, I) and y = 0 (Hill et al. 2022)."""
        purifier = HatPurifier(
            self.energy, self.generator, self.encoder, chain.steps, chain.step_size,
            latent_step_size, chain.temperature,
        )  # fmt: skip
        z = self.latents(draws, "latents")
        state = {"z": z, "y": torch.zeros_like(self.generator(z).detach())}
        ends = purifier.advance(state, draws.noise("hat chain"), range(chain.steps))
        image: Tensor = self.generator(ends["z"]) + ends["y"]
        return image.detach()

    def pairs(self, draws: Draws, chain: LangevinSettings, latent_step_size: float) -> Joint:
        """Draw z and x by chains of exp(−E(x, z)/T) from z ~ N(0, I) and x = G(z)."""
        purifier = PairPurifier(
            self.energy, self.encoder, chain.steps, chain.step_size, latent_step_size,
            chain.temperature,
        )  # fmt: skip
        z = self.latents(draws, "latents")
        state = {"z": z, "x": self.generator(z).detach()}
        return purifier.advance(state, draws.noise("pair chain"), range(chain.steps))

    def misfit(self, x: Tensor, z: Tensor, sigma: float) -> Tensor:
        """Return −log N(x; G(z), σ²) but for a constant, its mean over the batch."""
        return half_square(x - self.generator(z)).mean() / sigma**2

    def infer(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return z ~ q(z | x), made of standard noise, and the mean KL(q(z | x) ‖ N(0, I))."""
        mean, log_std = self.encoder.moments(x)
        divergence = (mean.square() + (2 * log_std).exp()) / 2 - log_std - 0.5
        return mean + log_std.exp() * noise, divergence.sum(1).mean()

    def surprise(self, z: Tensor, x: Tensor) -> Tensor:
        """Return −log q(z | x) but for a constant, its mean over the batch."""
        mean, log_std = self.encoder.moments(x)
        return (((z - mean) / log_std.exp()).square() / 2 + log_std).sum(1).mean()
