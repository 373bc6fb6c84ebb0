"""An energy on top of a generator as base: generalised EBM."""

from __future__ import annotations

from torch import Tensor, nn

from ebm_defense.purifiers.joint import JointPurifier
from ebm_defense.purifiers.path import Joint, from_unit, half_square, to_unit


class GEBMPurifier(JointPurifier):
    """A latent chain of N(z; 0, I)·exp(−E(G(z))/T) (Arbel, Zhou, Gretton 2021, GEBM).

    An image x starts at z = Enc(x), moves in latent space, and is purified to G(z): what the
    generator cannot make is lost at once.

    Args:
        energy: E, `[N, C, H, W]` in [-1, 1] to `[N]`.
        generator: G, z `[N, d]` to images in [-1, 1].
        encoder: Enc, images in [-1, 1] to z.
        steps: K ≥ 0.
        step_size: of z, > 0.
        temperature: T > 0, in units of E.

    Raises:
        UsageError: a setting out of range.
    """

    caption = (
        "GEBM, {steps} latent Langevin steps of size {step_size:g} at temperature {temperature:g}"
    )

    def __init__(
        self,
        energy: nn.Module,
        generator: nn.Module,
        encoder: nn.Module,
        steps: int = 20,
        step_size: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.energy, self.generator, self.encoder = energy, generator, encoder
        self.steps, self.step_size, self.temperature = steps, step_size, temperature
        self.check(temperature=temperature)

    def step_sizes(self) -> dict[str, float]:
        return {"z": self.step_size}

    def potential(self, state: Joint) -> Tensor:
        z = state["z"]
        x = self.net("generator", z)(z)
        return half_square(z) + self.net("energy", x)(x) / self.temperature

    def enter(self, images: Tensor) -> Joint:
        x = from_unit(images)
        return {"z": self.net("encoder", x)(x)}

    def leave(self, x: Joint) -> Tensor:
        return to_unit(self.net("generator", x["z"])(x["z"]))
