"""A gradient through energies whose activations have corners and no curvature."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_defense.attacks.gradients.base import Purified
from ebm_defense.attacks.gradients.curvature import LentCurvature
from ebm_defense.attacks.gradients.full import ChainGradient
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise
from ebm_defense.purifiers.base import Purifier, SteppedPurifier


@dataclass(frozen=True, kw_only=True)
class Smoothed(ChainGradient):
    """The gradient through all steps with curvature lent to LeakyReLU and ReLU.

    Their energies are piecewise linear, so that the exact gradient is the identity's and says
    nothing of where the chain would have gone from a nearby start. Here the forward chain is the
    true one, and on the way back the Hessian is that of the network whose corners are bent as in
    soft_lrelu, (1−a)x + a√(x²+e²) − ae, at the true pre-activations and slopes. A purifier that is
    no chain has nothing to smooth and is differentiated as it is, as by `Full`. It holds every
    `stride`-th state of the chains, or the square root of that many.

    Attributes:
        width: e above 0, in standard deviations of each image's own pre-activations in a layer, so
            that it has no scale; towards 0 this is `Identity`.
        end_width: e at the chain's end, if another; between them it is geometric in the step.
        stride: one Hessian-vector product for so many steps, taken at their start, with their
            drift together.
        perturbation: standard deviation ≥ 0, in [0, 1] pixel units, of Gaussian perturbations of
            the start over which the way back is averaged; the loss's gradient stays that at the
            purified image of the unperturbed start.
        draws: how many perturbations a replicate.
    """

    width: float = 0.3
    end_width: float | None = None
    stride: int = 4
    perturbation: float = 0.0
    draws: int = 1

    own_curvature = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.width < math.inf and 0 < self.last_width < math.inf):
            raise UsageError(
                f"the bend's widths must be above 0, not {self.width} and {self.last_width}."
            )
        if self.stride < 1 or self.draws < 1:
            raise UsageError(
                f"stride and draws must be at least 1, not {self.stride} and {self.draws}."
            )
        if not 0 <= self.perturbation < math.inf:
            raise UsageError(f"the perturbation must be 0 or more, not {self.perturbation}.")
        if self.draws > 1 and not self.perturbation:
            raise UsageError("several draws need a perturbation above 0; without it all agree.")

    @property
    def name(self) -> str:
        end = "" if self.end_width is None else f" to {self.end_width:g}"
        random = f", {self.draws} x N(0, {self.perturbation:g}²)" if self.perturbation else ""
        return f"smoothed, width {self.width:g}{end}, stride {self.stride}{random}"

    @property
    def last_width(self) -> float:
        """The width at the chain's end."""
        return self.width if self.end_width is None else self.end_width

    @property
    def spacing(self) -> int:
        return self.stride

    def width_at(self, step: int, steps: int) -> float:
        """Return the width at one of the chain's steps."""
        return self.width * (self.last_width / self.width) ** (step / max(steps - 1, 1))

    def lent_curvature(self, step: int, steps: int) -> LentCurvature:
        return LentCurvature(self.width_at(step, steps))

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        """Purify `images` `[b, C, H, W]` with the noise of `keys` `[r, b]`.

        Raises:
            UsageError: no activation of the energy is LeakyReLU or ReLU, or as
                `ChainGradient.purify`.
        """
        if keys.numel():
            refuse_without_corners(defense.purifier, images[:1].detach(), KeyedNoise(keys[0, :1]))
        return super().purify(defense, images, keys)

    def differentiate(
        self, purifier: Purifier, images: Tensor, noise: KeyedNoise, held: float
    ) -> Purified:
        if not self.perturbation:
            return super().differentiate(purifier, images, noise, held)
        once = super().differentiate
        purified = purifier(images, noise=noise)

        def vjp(cotangent: Tensor) -> Tensor:
            total = torch.zeros_like(cotangent)
            for draw in range(self.draws):
                # The chain draws at steps 0 to K − 1, so later ones are independent of it.
                z = noise.normal(purifier.chain_steps + draw, images)
                with torch.no_grad():
                    near = once(purifier, images + self.perturbation * z, noise, held)
                total += near.vjp(cotangent)
            return total / self.draws

        return Purified(purified, vjp)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of a query of one image, in Langevin steps; see `ChainGradient`."""
        once = super().chain_steps(defense, replicates)
        if not self.perturbation:
            return once
        return replicates * defense.purifier.chain_steps + self.draws * once


def refuse_without_corners(purifier: Purifier, image: Tensor, noise: KeyedNoise) -> None:
    """Refuse a chain in whose first step no activation would be bent, on one image `[1, …]`."""
    if not (isinstance(purifier, SteppedPurifier) and purifier.chain_steps):
        return
    x = purifier.enter(image)
    with torch.no_grad(), LentCurvature(1.0) as lent_curvature:
        purifier.vjp_step(x, x, noise, 0)  # `advance` may compute without torch's activations
    if not lent_curvature.found:
        raise UsageError(
            "the energy calls neither LeakyReLU nor ReLU, so there is nothing to smooth; use Full."
        )
