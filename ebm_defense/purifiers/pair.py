"""An energy of an image and its latents together."""

from __future__ import annotations

from torch import Tensor, nn

from ebm_defense.purifiers.joint import JointPurifier
from ebm_defense.purifiers.path import Joint, from_unit, to_unit


class PairPurifier(JointPurifier):
    """A chain over an image x and its latents z of exp(−E(x, z)/T) (Han et al. 2020).

    It starts at the image and at z = Enc(x); each step moves z, then x. Without a step nothing
    changes.

    Args:
        energy: E, images `[N, C, H, W]` in [-1, 1] and z `[N, d]` to `[N]`.
        encoder: Enc, images in [-1, 1] to z.
        steps: K ≥ 0.
        step_size: of x, > 0, in [-1, 1] pixel units.
        latent_step_size: of z, > 0.
        temperature: T > 0, in units of E.

    Raises:
        UsageError: a setting out of range.
    """

    caption = (
        "joint energy of image and latents, {steps} Langevin steps of size {step_size:g} on the "
        "image and {latent_step_size:g} on the latents at temperature {temperature:g}"
    )

    def __init__(
        self,
        energy: nn.Module,
        encoder: nn.Module,
        steps: int = 20,
        step_size: float = 0.05,
        latent_step_size: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.energy, self.encoder, self.steps = energy, encoder, steps
        self.step_size, self.latent_step_size = step_size, latent_step_size
        self.temperature = temperature
        self.check(temperature=temperature)

    def step_sizes(self) -> dict[str, float]:
        return {"z": self.latent_step_size, "x": self.step_size}

    def potential(self, state: Joint) -> Tensor:
        x, z = state["x"], state["z"]
        value: Tensor = self.net("energy", x)(x, z)
        return value / self.temperature

    def enter(self, images: Tensor) -> Joint:
        x = from_unit(images)
        return {"z": self.net("encoder", x)(x), "x": x}

    def leave(self, x: Joint) -> Tensor:
        return to_unit(x["x"])
