"""The Hessian-vector product of a `ConvEnergy`, forward and backward by hand (Pearlmutter 1994).

With z = W·h and σ(z) of each layer, the way up carries h and its derivative along v, dh; the way
down carries the energy's gradient g and its derivative dg, which a layer maps to Wᵀ(σ′·g) and
Wᵀ(σ′·dg + σ″·dz·g). The last layer is linear, so that dg starts at its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies.conv import ConvEnergy, SoftLeakyReLU
from ebm_defense.engine.base import Curvature, Energy
from ebm_defense.engine.convolutional import hidden_layers, input_gradient, shape_and_weights
from ebm_defense.engine.derivatives import arithmetic
from ebm_defense.engine.fused import convolution
from ebm_defense.engine.smooth import closed_form

_LARGEST_MAP = 2**24
"""Bytes of a layer's map above which images are taken in turn: more at once hold more memory and
are no faster."""


class Linearised(NamedTuple):
    """What the way up leaves of an activation: σ(z), its derivative, and what the way down needs.

    Attributes:
        h: σ(z).
        dh: σ′(z)·dz.
        slope: σ′(z).
        bend: σ″(z)·dz, or None for zero.
    """

    h: Tensor
    dh: Tensor
    slope: Tensor
    bend: Tensor | None


class Corner:
    """LeakyReLU, which has no curvature but what it is lent."""

    curved = False

    def __init__(self, activation: nn.LeakyReLU, like: Tensor) -> None:
        self.slope = activation.negative_slope
        self.one = like.new_ones(())

    def __call__(self, z: Tensor, dz: Tensor, lent: Curvature | None) -> Linearised:
        """Activate pre-activations z and their derivative dz, which are written over."""
        bend = None if lent is None else lent(z, self.slope).mul_(dz)
        # Ten times as fast as torch.where on a CPU.
        slope = torch.ops.aten.leaky_relu_backward(self.one.expand_as(z), z, self.slope, False)
        return Linearised(F.leaky_relu_(z, self.slope), dz.mul_(slope), slope, bend)


class SoftCorner:
    """Smooth LeakyReLU, whose curvature is a·e²/(z² + e²)^{3/2}."""

    curved = True

    def __init__(self, activation: SoftLeakyReLU, like: Tensor) -> None:
        self.a, self.e = (1.0 - activation.slope) / 2.0, activation.width
        self.square, self.one = like.new_full((), self.e**2), like.new_ones(())
        self.zero = like.new_zeros(())

    def __call__(self, z: Tensor, dz: Tensor, lent: Curvature | None) -> Linearised:
        """Activate pre-activations z and their derivative dz, which is written over."""
        near = torch.addcmul(self.square, z, z).rsqrt_()
        slope = (z * near).lerp_(self.one, 1.0 - self.a)
        bend = torch.addcmul(self.zero, near.pow(3), dz, value=self.a * self.e**2)
        h = near.reciprocal_().sub_(self.e).lerp_(z, 1.0 - self.a)
        return Linearised(h, dz.mul_(slope), slope, bend)


class ClosedCorner:
    """A smooth activation whose derivatives are known in closed form."""

    curved = True

    def __init__(self, activation: nn.Module, like: Tensor) -> None:
        closed = closed_form(activation)
        assert closed is not None
        self.closed = closed

    def __call__(self, z: Tensor, dz: Tensor, lent: Curvature | None) -> Linearised:
        """Activate pre-activations z and their derivative dz, which is written over."""
        value, slope, curvature = self.closed(z)
        bend = curvature.mul_(dz)
        return Linearised(value, dz.mul_(slope), slope, bend)


CORNERS: dict[type[nn.Module], Callable[..., Corner | SoftCorner | ClosedCorner]] = {
    nn.LeakyReLU: Corner,
    SoftLeakyReLU: SoftCorner,
    nn.SiLU: ClosedCorner,
    nn.Softplus: ClosedCorner,
}


class Layer:
    """One convolution, without and with bias, its input gradient, and the activation after it."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module, size: int, dtype: torch.dtype):
        c, weight, bias = shape_and_weights(conv, size, dtype)
        geometry = c.stride, c.padding, (1, c.fan_in, size, size)
        self.value = convolution(weight, bias, *geometry)
        self.tangent = convolution(weight, None, *geometry)
        self.backward = input_gradient(c, weight)
        self.activation = CORNERS[type(activation)](activation, weight)
        self.numbers = c.fan_out * c.out**2


class ConvProduct:
    """v ↦ ∇²U(x)·v of a `ConvEnergy`, made once a chain and called once a step.

    Args:
        energy: the network, whose weights are copied as they are now.
        precision: of the inner activations, "fp32" or "bf16".
    """

    def __init__(self, energy: ConvEnergy, precision: str) -> None:
        self.precision = precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.layers = [Layer(*layer, self.dtype) for layer in hidden_layers(energy)]
        last: Any = energy.f[-1]
        self.slope = last.weight.detach().to(self.dtype)
        largest = max(layer.numbers for layer in self.layers) * self.dtype.itemsize
        self.at_once = max(1, _LARGEST_MAP // largest)

    @classmethod
    @torch.no_grad()
    def prepare(cls, energy: Energy, x: Tensor, precision: str) -> ConvProduct:
        """Make the product for chains of images such as x, as an engine does."""
        assert isinstance(energy, ConvEnergy)
        return cls(energy, precision)

    @torch.no_grad()
    def __call__(self, x: Tensor, vector: Tensor, lent: Curvature | None = None) -> Tensor:
        if lent is None and not any(layer.activation.curved for layer in self.layers):
            return torch.zeros_like(vector)
        parts = -(-len(x) // self.at_once) if x.device.type == "cpu" else 1
        pairs = zip(x.tensor_split(parts), vector.tensor_split(parts), strict=True)
        with arithmetic("fp32", x.device):
            return torch.cat([self._product(*pair, lent).to(x.dtype) for pair in pairs])

    def _product(self, x: Tensor, vector: Tensor, lent: Curvature | None) -> Tensor:
        h, dh = (t.to(self.dtype, memory_format=torch.channels_last) for t in (x, vector))
        kept = []
        for layer in self.layers:
            h, dh, slope, bend = layer.activation(layer.value(h), layer.tangent(dh), lent)
            kept.append((layer, slope, bend))
        g, dg = self.slope.expand_as(h), torch.zeros_like(h)
        for layer, slope, bend in reversed(kept):
            dg = dg.mul_(slope)
            dg = layer.backward(dg if bend is None else dg.addcmul_(bend, g))
            if layer is not self.layers[0]:
                g = layer.backward(g * slope)
        return dg
