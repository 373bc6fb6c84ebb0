"""Curvature lent to activations that have corners and none of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def curvature(x: Tensor, slope: float, e: Tensor) -> Tensor:
    """Return the second derivative of soft_lrelu, a·e²/(x²+e²)^{3/2}; 0 where x and e are.

    Args:
        x: pre-activations `[b, …]`.
        slope: for x < 0; a = (1 − slope)/2.
        e: half-width of the bend, `[b, 1, …]`.
    """
    near = torch.addcmul(e * e, x, x).clamp_min_(torch.finfo(x.dtype).tiny).rsqrt_()
    return (near * (math.sqrt((1.0 - slope) / 2.0) * e)).square_().mul_(near)


def half_widths(x: Tensor, width: float) -> Tensor:
    """Return e `[b, 1, …]`: `width` standard deviations of each image's own x[i] of `[b, …]`."""
    flat = x.detach().movedim(1, -1).flatten(1)  # a view of maps in channels_last
    work = flat.to(torch.promote_types(x.dtype, torch.float32))
    # torch.std takes twenty times as long on a CPU.
    spread = torch.linalg.vector_norm(work - work.mean(1, keepdim=True), dim=1)
    e = spread * (width / math.sqrt(flat.shape[1]))
    return e.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class _Slope(torch.autograd.Function):
    """The slope of LeakyReLU; its derivative is that of soft_lrelu's slope, a·e²/(x²+e²)^{3/2}."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, e: Tensor) -> Tensor:
        ctx.save_for_backward(x, e)
        ctx.slope = slope
        return torch.where(x > 0, 1.0, slope).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, e = ctx.saved_tensors
        return grads[0] * curvature(x, ctx.slope, e), None, None


class _SmoothedCorner(torch.autograd.Function):
    """LeakyReLU with the curvature of soft_lrelu: value and slope are its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, e: Tensor) -> Tensor:
        ctx.save_for_backward(x, e)
        ctx.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, e = ctx.saved_tensors
        return grads[0] * _Slope.apply(x, ctx.slope, e), None, None


def smoothed_corner(x: Tensor, slope: float, width: float) -> Tensor:
    """Return LeakyReLU(x), with the second derivative of soft_lrelu (Du, Hill, Cai 2026, MEFA).

    Args:
        x: pre-activations `[b, …]`.
        slope: for x < 0; 0 is ReLU.
        width: the bend's e, in standard deviations of each image's own pre-activations x[i].
    """
    return _SmoothedCorner.apply(x, slope, half_widths(x, width))


def _leaky(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> float:
    return negative_slope


def _rectified(x: Tensor, inplace: bool = False) -> float:
    return 0.0


CORNERS: dict[Callable[..., Any], Callable[..., float]] = {
    F.leaky_relu: _leaky,
    F.relu: _rectified,
    torch.relu: _rectified,
    Tensor.relu: _rectified,
}
"""The activations that are bent, each with its slope for x < 0 from the call's own arguments;
nn.LeakyReLU and nn.ReLU call the first two."""


class LentCurvature(TorchFunctionMode):
    """While it is active, every activation in `CORNERS` has the curvature of `smoothed_corner`.

    It changes no module: it stands between the caller and torch. An engine that does not call
    torch's activations takes `curvature` instead.

    Args:
        width: see `smoothed_corner`.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width, self.found = width, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in CORNERS:
            return func(*args, **(kwargs or {}))
        self.found += 1
        slope = CORNERS[func](*args, **(kwargs or {}))
        return smoothed_corner((args or (kwargs["input"],))[0], slope, self.width)

    def curvature(self, x: Tensor, slope: float) -> Tensor:
        """Return `smoothed_corner`'s curvature at pre-activations `[b, …]`, slope for x < 0."""
        return curvature(x, slope, half_widths(x, self.width))
