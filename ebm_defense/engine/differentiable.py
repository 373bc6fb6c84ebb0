"""∇U as an ordinary function of images *and* weights, which one backward pass differentiates.

Learning through a chain needs the derivative of ∇U by both. Double autograd builds the graph of a
graph for it. Here the energy's gradient is a network of its own, up through the layers and down
through their transposes, and each activation hands on its value and its slope with both
derivatives in closed form: ∂σ/∂z = σ′ and ∂σ′/∂z = σ″.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies.conv import ConvEnergy
from ebm_defense.engine.base import Energy
from ebm_defense.engine.smooth import Closed, closed_form

GradientMap = Callable[[Tensor], Tensor]
"""Maps states `[b, C, H, W]` to ∇U there; both derivatives of it are kept by autograd."""


def differentiable_gradient(
    energy: Energy, precision: str = "fp32", *, compiled: bool = False
) -> GradientMap:
    """Return ∇U, differentiable by the images and by the energy's weights as they are now.

    Args:
        energy: maps `[b, C, H, W]` in [-1, 1] to `[b]`; a plain `ConvEnergy` is fused, anything
            else is differentiated twice by autograd.
        precision: of the inner activations, "fp32" or "bf16"; float64 states keep float64.
        compiled: let torch compile a layer's activation, which needs a C++ compiler on a CPU.
    """
    if type(energy) is ConvEnergy and _activations(energy) is not None:
        return ConvStep(energy, precision, compiled)
    return lambda x: _twice(energy, x, precision)


def _activations(energy: ConvEnergy) -> list[Closed] | None:
    found = [closed_form(layer) for layer in list(energy.f)[1::2]]
    known = [closed for closed in found if closed is not None]
    return known if len(known) == len(found) else None


def _twice(energy: Energy, x: Tensor, precision: str) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    reduced = precision == "bf16" and x.dtype == torch.float32
    with torch.autocast(x.device.type, torch.bfloat16) if reduced else nullcontext():
        value = energy(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=True)
    return gradient


class _Weights(NamedTuple):
    """A convolution's weights as its step uses them."""

    weight: Tensor
    bias: Tensor
    stride: int
    padding: int


class ConvStep:
    """∇U of a `ConvEnergy` by two plain passes; weights are cast once, for all of a chain's steps.

    Args:
        energy: the network.
        precision: "fp32" or "bf16".
        compiled: let torch compile the activations.
    """

    def __init__(self, energy: ConvEnergy, precision: str, compiled: bool = False) -> None:
        layers = list[Any](energy.f)
        closed = _activations(energy)
        assert closed is not None
        dtype = torch.bfloat16 if precision == "bf16" else layers[0].weight.dtype
        self.activations = [_ready(c, compiled) for c in closed]
        self.hidden = [_weights(conv, dtype) for conv in layers[:-1:2]]
        self.last = _weights(layers[-1], dtype).weight
        self.dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        sizes, slopes = [], []
        h = x.to(self.dtype, memory_format=torch.channels_last)
        for w, activation in zip(self.hidden, self.activations, strict=True):
            sizes.append(h.shape[-1])
            h, slope = _Activation.apply(F.conv2d(h, *w), *activation)
            slopes.append(slope)
        g = self.last * slopes.pop()
        for w, size in zip(self.hidden[::-1], sizes[::-1], strict=True):
            g = _transposed(g, w, size)
            if slopes:
                g = g * slopes.pop()
        return g.to(x.dtype)


def _weights(conv: nn.Conv2d, dtype: torch.dtype) -> _Weights:
    assert conv.bias is not None
    weight = conv.weight.to(dtype, memory_format=torch.channels_last)
    return _Weights(weight, conv.bias.to(dtype), conv.stride[0], int(conv.padding[0]))


def _transposed(g: Tensor, w: _Weights, size: int) -> Tensor:
    """Return the input gradient of a convolution of maps of this size."""
    covered = (g.shape[-1] - 1) * w.stride - 2 * w.padding + w.weight.shape[-1]
    return F.conv_transpose2d(g, w.weight, None, w.stride, w.padding, size - covered)


Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor], Tensor]


def _ready(closed: Closed, compiled: bool) -> tuple[Forward, Backward]:
    """Return (σ, σ′)(z) and their vector-Jacobian product, computed in fp32 where z is bf16."""

    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        jet = closed(_wide(z))
        return jet.value.to(z.dtype), jet.slope.to(z.dtype)

    def backward(z: Tensor, by_value: Tensor, by_slope: Tensor) -> Tensor:
        jet = closed(_wide(z))
        return (jet.slope * by_value + jet.curvature * by_slope).to(z.dtype)

    if not compiled:
        return forward, backward
    if closed not in _COMPILED:
        _COMPILED[closed] = torch.compile(forward), torch.compile(backward)
    return _COMPILED[closed]


_COMPILED: dict[Closed, tuple[Forward, Backward]] = {}


def _wide(z: Tensor) -> Tensor:
    return z.float() if z.dtype == torch.bfloat16 else z


class _Activation(torch.autograd.Function):
    """z to (σ(z), σ′(z)); keeps z alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, forward: Forward, backward: Backward) -> Any:
        ctx.save_for_backward(z)
        ctx.vjp = backward
        return forward(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        return ctx.vjp(z, *grads), None, None
