"""The input gradient of a `ConvEnergy`, forward and backward by hand.

Autograd keeps a graph, casts the weights at every step and makes input gradients by oneDNN's and
cuDNN's strided kernels. Here weights are cast, packed and rearranged once a chain; of each layer
only what its activation's slope needs is kept; the last layer, whose input gradient is its own
weight, is run only where energies are asked for; and input gradients are made by blocks (see
`subpixel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebm_defense.energies.conv import ConvEnergy, SoftLeakyReLU
from ebm_defense.engine import triton_kernels
from ebm_defense.engine.base import Energy
from ebm_defense.engine.derivatives import repeatable, tf32
from ebm_defense.engine.fused import Map, convolution
from ebm_defense.engine.smooth import closed_form
from ebm_defense.engine.subpixel import Blocks, Convolution, best_blocks


class Activation:
    """LeakyReLU: the sign of its own output tells its slope."""

    def __init__(self, activation: nn.LeakyReLU, like: Tensor) -> None:
        self.slope = activation.negative_slope
        self.signature = ("leaky_relu", self.slope)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation of `z`, already applied by the convolution, and what to keep."""
        return z, z

    def backward(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """Return gradient times slope, written over what was kept no longer."""
        return torch.ops.aten.leaky_relu_backward.grad_input(
            gradient, kept, self.slope, True, grad_input=kept
        )


class SoftActivation:
    """Smooth LeakyReLU and its slope, both as means with weights 1 − a and a.

    With r = √(z² + e²) they are those of z and r − e, and of 1 and z/r. A mean is one pass over
    memory and rounds once, so that in bf16 the slope of z → −∞ keeps its digits.
    """

    slope = None

    def __init__(self, activation: SoftLeakyReLU, like: Tensor) -> None:
        self.a, self.e = (1.0 - activation.slope) / 2.0, activation.width
        self.square, self.one = like.new_full((), self.e**2), like.new_ones(())
        self.signature = ("soft_lrelu", self.a, self.e)
        self.fuses = triton_kernels.works(like.device)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation of `z` and its slope there."""
        if self.fuses:
            return triton_kernels.soft_leaky_(z, self.a, self.e)
        r = torch.addcmul(self.square, z, z).sqrt_()
        slope = (z / r).lerp_(self.one, 1.0 - self.a)
        return r.sub_(self.e).lerp_(z, 1.0 - self.a), slope

    def backward(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """Return gradient times slope, written over the slope."""
        return kept.mul_(gradient)


class ClosedActivation:
    """An activation whose value and slope are known in closed form."""

    slope = None

    def __init__(self, activation: nn.Module, like: Tensor) -> None:
        closed = closed_form(activation)
        assert closed is not None
        self.closed = closed
        self.signature = ("closed", repr(activation))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation of `z` and its slope there."""
        jet = self.closed(z)
        return jet.value, jet.slope

    def backward(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """Return gradient times slope, written over the slope."""
        return kept.mul_(gradient)


ACTIVATIONS: dict[
    type[nn.Module], Callable[..., Activation | SoftActivation | ClosedActivation]
] = {
    nn.LeakyReLU: Activation,
    SoftLeakyReLU: SoftActivation,
    nn.SiLU: ClosedActivation,
    nn.Softplus: ClosedActivation,
}


class Layer:
    """One convolution and the activation after it."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module, size: int, dtype: torch.dtype):
        c, weight, bias = shape_and_weights(conv, size, dtype)
        self.bend = ACTIVATIONS[type(activation)](activation, weight)
        example = (1, c.fan_in, size, size)
        self.forward = convolution(weight, bias, c.stride, c.padding, example, self.bend.slope)
        self.backward = input_gradient(c, weight)
        self.signature = (c, self.bend.signature)


def shape_and_weights(
    conv: nn.Conv2d, size: int, dtype: torch.dtype
) -> tuple[Convolution, Tensor, Tensor]:
    """Return the shape of a convolution of maps of this size, and its weight and bias."""
    assert conv.bias is not None
    weight, bias = (t.detach().to(dtype) for t in (conv.weight, conv.bias))
    return shape_of(conv, size), weight, bias


def shape_of(conv: nn.Conv2d, size: int) -> Convolution:
    """Return the shape of a convolution of maps of this size."""
    return Convolution(
        conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0],
        int(conv.padding[0]), size,
    )  # fmt: skip


def hidden_layers(energy: ConvEnergy) -> Iterator[tuple[nn.Conv2d, nn.Module, int]]:
    """Yield each convolution but the last, the activation after it, and the size of its input."""
    size, layers = energy.settings.image_size, list[Any](energy.f)
    for conv, activation in zip(layers[:-1:2], layers[1::2], strict=True):
        yield conv, activation, size
        size = shape_of(conv, size).out


def input_gradient(conv: Convolution, weight: Tensor) -> Map:
    """Return the map of a convolution's output gradient to its input gradient."""
    blocks = best_blocks(conv, weight.device.type)
    if blocks is None:
        return _library_gradient(conv, weight.contiguous(memory_format=torch.channels_last))
    example = weight.new_empty(1, conv.fan_out, conv.out, conv.out)
    padded, padding = blocks.pad(example)
    dense = convolution(blocks.weight(weight), None, blocks.stride, padding, tuple(padded.shape))
    return Map(partial(_by_blocks, blocks=blocks, dense=dense.run), dense.reads)


def _by_blocks(g: Tensor, *weights: Tensor, blocks: Blocks, dense: Callable[..., Tensor]) -> Tensor:
    return blocks.assemble(dense(blocks.pad(g)[0], *weights))


def _library_gradient(c: Convolution, weight: Tensor) -> Map:
    return Map(partial(_by_library, c=c), (weight,))


def _by_library(g: Tensor, weight: Tensor, *, c: Convolution) -> Tensor:
    geometry = [c.stride] * 2, [c.padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
    # Only the input's shape is read where no weight gradient is asked for.
    like = g.new_empty((1,)).expand(len(g), c.fan_in, c.size, c.size)
    return torch.ops.aten.convolution_backward(g, like, weight, None, *geometry)[0]


class ConvGradient:
    """∇U of a `ConvEnergy`, with its inner activations in `dtype`.

    Args:
        energy: the network, whose weights are copied as they are now.
        dtype: of the inner activations.
        precision: resolved; on a GPU it says whether fp32 products may be rounded to TF32.
    """

    def __init__(self, energy: ConvEnergy, dtype: torch.dtype, precision: str = "fp32") -> None:
        self.dtype, self.precision = dtype, precision
        self.layers = [Layer(*layer, dtype) for layer in hidden_layers(energy)]
        last: Any = energy.f[-1]
        weight = last.weight.detach().to(dtype)
        self.slope = weight.contiguous(memory_format=torch.channels_last)
        self.bias = last.bias.detach()
        layers = tuple(layer.signature for layer in self.layers)
        self.signature = (layers, tuple(weight.shape), dtype, precision)

    @property
    def reads(self) -> list[Tensor]:
        """The tensors made of the network's weights."""
        maps = [m for layer in self.layers for m in (layer.forward, layer.backward)]
        return [tensor for m in maps for tensor in m.reads] + [self.slope, self.bias]

    @classmethod
    @torch.no_grad()
    def prepare(cls, energy: Energy, x: Tensor, precision: str) -> ConvGradient:
        """Make the gradient for chains from x, as an engine does."""
        assert isinstance(energy, ConvEnergy)
        return cls(energy, torch.bfloat16 if precision == "bf16" else x.dtype, precision)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        with self._as_asked(x):
            return self._backward(*self._forward(x)).to(x.dtype)

    @torch.no_grad()
    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._as_asked(x):
            h, kept = self._forward(x)
            # Before the way back, which writes over what was kept.
            energy = (h.to(x.dtype) * self.slope.to(x.dtype)).flatten(1).sum(1) + self.bias
            return energy, self._backward(h, kept).to(x.dtype)

    @contextmanager
    def _as_asked(self, x: Tensor) -> Iterator[None]:
        with (
            torch.autocast(x.device.type, enabled=False),
            tf32(self.precision == "tf32", x.device),
            repeatable(x.device),
        ):
            yield

    def _forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, kept = x.to(self.dtype, memory_format=torch.channels_last), []
        for layer in self.layers:
            h, keep = layer.bend.forward(layer.forward(h))
            kept.append(keep)
        return h, kept

    def _backward(self, h: Tensor, kept: Sequence[Tensor]) -> Tensor:
        g = self.slope.expand_as(h)
        for layer, keep in zip(reversed(self.layers), reversed(kept), strict=True):
            g = layer.backward(layer.bend.backward(g, keep))
        return g


def supports(energy: Energy, x: Tensor, precision: str) -> bool:
    """Whether this is a plain `ConvEnergy` of x's device and dtype, and x a batch of its images.

    float64 is left to autograd, the referee; so are energies with hooks, whose forward must run.
    """
    if type(energy) is not ConvEnergy or precision == "fp64" or not len(x):
        return False
    s = energy.settings
    own = all(type(layer) in (nn.Conv2d, *ACTIVATIONS) and not _hooked(layer) for layer in energy.f)
    alike = all(p.dtype == x.dtype and p.device == x.device for p in energy.parameters())
    return (
        own and alike and not _hooked(energy) and x.shape[1:] == (s.channels, *[s.image_size] * 2)
    )


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or parametrize.is_parametrized(module)
