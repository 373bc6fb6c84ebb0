"""An energy of what a generator makes, and of what is missing from it: Hat EBM."""

from __future__ import annotations

from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.purifiers.joint import JointPurifier
from ebm_defense.purifiers.path import Joint, from_unit, to_unit


class HatPurifier(JointPurifier):
    """A chain over the latent z and the residual y of E(G(z) + y) (Hill et al. 2022, Hat EBM).

    An image x starts at z = Enc(x) and y = x − G(z), so that the chain begins at x itself, and is
    purified to G(z) + y. A step moves z by its gradient of E/T, then y by that of E/T + τ·‖y‖².

    Args:
        energy: E, `[N, C, H, W]` in [-1, 1] to `[N]`.
        generator: G, z `[N, d]` to images in [-1, 1].
        encoder: Enc, images in [-1, 1] to z.
        steps: K ≥ 0.
        step_size: of y, > 0, in [-1, 1] pixel units.
        latent_step_size: of z, ≥ 0; with 0 z stays where it began.
        temperature: T > 0, in units of E.
        residual: τ ≥ 0, what holds y near 0.

    Raises:
        UsageError: a setting out of range.
    """

    caption = (
        "Hat EBM, {steps} Langevin steps of size {step_size:g} on the residual and "
        "{latent_step_size:g} on the latent at temperature {temperature:g}"
    )

    def __init__(
        self,
        energy: nn.Module,
        generator: nn.Module,
        encoder: nn.Module,
        steps: int = 50,
        step_size: float = 0.05,
        latent_step_size: float = 0.05,
        temperature: float = 1.25e-3,
        residual: float = 0.0,
    ) -> None:
        super().__init__()
        self.energy, self.generator, self.encoder = energy, generator, encoder
        self.steps, self.step_size, self.latent_step_size = steps, step_size, latent_step_size
        self.temperature, self.residual = temperature, residual
        if not (latent_step_size >= 0 and 0 <= residual < float("inf")):
            raise UsageError(
                "latent_step_size and residual must be 0 or more, not "
                f"{latent_step_size} and {residual}."
            )
        self.check(temperature=temperature)

    def step_sizes(self) -> dict[str, float]:
        latent = {"z": self.latent_step_size} if self.latent_step_size else {}
        return latent | {"y": self.step_size}

    def potential(self, state: Joint) -> Tensor:
        y = state["y"]
        energy = self.net("energy", y)(self._image(state)) / self.temperature
        return energy + self.residual * y.flatten(1).square().sum(1)

    def enter(self, images: Tensor) -> Joint:
        x = from_unit(images)
        z = self.net("encoder", x)(x)
        return {"z": z, "y": x - self.net("generator", z)(z)}

    def leave(self, x: Joint) -> Tensor:
        return to_unit(self._image(x))

    def _image(self, state: Joint) -> Tensor:
        """Return G(z) + y."""
        return self.net("generator", state["z"])(state["z"]) + state["y"]
