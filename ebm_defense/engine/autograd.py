"""∇U by autograd: any energy, any dtype, any device."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ebm_defense.engine.base import Energy
from ebm_defense.engine.derivatives import repeatable, tf32
from ebm_defense.errors import UsageError


class AutogradGradient:
    """∇U of any energy, by autograd under autocast where the precision is bf16."""

    signature: Hashable = None  # anybody's code, which may keep a state or wait for the host
    reads: Sequence[Tensor] = ()

    def __init__(self, energy: Energy, precision: str) -> None:
        self.energy, self.precision = energy, precision

    def __call__(self, x: Tensor) -> Tensor:
        return energy_and_gradient(self.energy, x, self.precision)[1]

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return energy_and_gradient(self.energy, x, self.precision)


def energy_and_gradient(
    energy: Energy, x: Tensor, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return U(x) `[b]` and ∇U(x), whatever grad mode the caller is in; no graph is kept.

    Raises:
        UsageError: the energy is not one number an image, or does not depend on x.
    """
    # Attack libraries predict under no_grad and some callers under inference_mode, but the
    # chain always needs this one gradient.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        tf32(precision == "tf32", x.device),
        repeatable(x.device),
    ):
        x = x.clone() if x.is_inference() else x.detach()
        x.requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            value = energy(x)
        if value.shape != x.shape[:1]:
            raise UsageError(
                f"an energy must return one number an image, shape {tuple(x.shape[:1])}, "
                f"but this one returned shape {tuple(value.shape)}."
            )
        gradient = _input_gradient(value, x)
    return value.detach(), gradient


def _input_gradient(value: Tensor, x: Tensor) -> Tensor:
    gradient = None
    if value.requires_grad:
        # A contiguous ones_like: an expanded gradient would lose channels_last on the way back.
        ones = torch.ones_like(value)
        (gradient,) = torch.autograd.grad(value, x, ones, allow_unused=True)
    if gradient is None:
        raise UsageError("an energy must depend on its images, but this one has no gradient.")
    return gradient
