"""The posterior of a generator whose prior is an energy of its latents."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ebm_defense.generators.networks import Generator
from ebm_defense.purifiers.joint import JointPurifier
from ebm_defense.purifiers.path import Joint, from_unit, half_square, to_unit


class LatentPurifier(JointPurifier):
    """A posterior chain p(z | x) ∝ exp(−U(z))·N(z; 0, I)·N(x; G(z), σ²) (Pang et al. 2020).

    The image x that came in is held while z explains it, and z's image G(z) comes out. Of a
    generator of two layers U is of both (Cui, Wu, Han 2023), and the chain is in their noises.

    Args:
        energy: U, z `[N, d]` to `[N]`, beside the base N(0, I).
        generator: G, z `[N, d]` to images in [-1, 1].
        encoder: images in [-1, 1] to the z where the chain starts; without one it starts at 0.
        steps: K ≥ 0.
        step_size: of z, > 0.
        sigma: σ > 0 of an image around G(z), in [-1, 1] pixel units.

    Raises:
        UsageError: a setting out of range.
    """

    caption = (
        "posterior of a latent energy prior, {steps} Langevin steps of size {step_size:g}, "
        "sigma {sigma:g}"
    )

    def __init__(
        self,
        energy: nn.Module,
        generator: Generator,
        encoder: nn.Module | None = None,
        steps: int = 20,
        step_size: float = 0.1,
        sigma: float = 0.3,
    ) -> None:
        super().__init__()
        self.energy, self.encoder = energy, encoder
        self.generator: Generator = generator
        self.steps, self.step_size, self.sigma = steps, step_size, sigma
        self.check(sigma=sigma)

    def step_sizes(self) -> dict[str, float]:
        return {"z": self.step_size}

    def potential(self, state: Joint) -> Tensor:
        z, x = state["z"], state["x"]
        generator = cast(Generator, self.net("generator", z))
        prior = self.net("energy", z)(generator.latents(z)) + half_square(z)
        return prior + half_square(x - generator(z)) / self.sigma**2

    def enter(self, images: Tensor) -> Joint:
        x = from_unit(images)
        if self.encoder is not None:
            return {"z": self.net("encoder", x)(x), "x": x}
        return {"z": x.new_zeros(len(x), self.generator.settings.size), "x": x}

    def leave(self, x: Joint) -> Tensor:
        return to_unit(self.net("generator", x["z"])(x["z"]))
