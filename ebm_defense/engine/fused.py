"""Convolutions with what follows them, by oneDNN with weights packed once, or by torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.engine import triton_kernels


@dataclass(frozen=True)
class Map:
    """A linear map and what follows it, as a function of its input and of tensors that it reads.

    The tensors stand apart, so that a captured graph can be given other weights.

    Attributes:
        run: maps the input and the tensors to the output.
        reads: the tensors.
    """

    run: Callable[..., Tensor]
    reads: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.run(x, *self.reads)


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    shape: tuple[int, ...],
    slope: float | None = None,
) -> Map:
    """Return the convolution as a function of its input, followed by LeakyReLU if a slope is given.

    Args:
        weight: `[fan_out, fan_in, k, k]`, of the input's device and dtype.
        bias: `[fan_out]` or None.
        stride: of both axes.
        padding: of both axes, with zeros.
        shape: an input's shape, for which the weights are packed; other batch sizes work too.
        slope: of the LeakyReLU.
    """
    packed = _packed(weight, bias, stride, padding, shape, slope)
    return packed or _plain(weight, bias, stride, padding, slope)


def _plain(
    weight: Tensor, bias: Tensor | None, stride: int, padding: int, slope: float | None
) -> Map:
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "slope": slope}
    if bias is None:
        return Map(partial(_convolve, **geometry), (weight,))
    fuses = slope is not None and triton_kernels.works(weight.device)
    run = _convolve_and_bend if fuses else _convolve
    return Map(partial(run, **geometry), (weight, bias))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int,
    padding: int,
    slope: float | None,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    return y if slope is None else F.leaky_relu_(y, slope)


def _convolve_and_bend(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int, slope: float
) -> Tensor:
    return triton_kernels.bias_leaky_(F.conv2d(x, weight, None, stride, padding), bias, slope)


def _packed(
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    shape: tuple[int, ...],
    slope: float | None,
) -> Map | None:
    # Packing pays in bf16 alone: oneDNN's fp32 convolutions gained nothing from it.
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    geometry = [padding] * 2, [stride] * 2, [1, 1], 1
    activation = ("none", []) if slope is None else ("leaky_relu", [slope])
    try:
        # What torch's own compiler calls on CPUs; not promised to stay, hence the way out.
        run = torch.ops.mkldnn._convolution_pointwise
        pack: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
        packed = pack(weight.to_mkldnn(), *geometry, list(shape))
    except (AttributeError, RuntimeError):
        return None
    return Map(lambda x: run(x, packed, bias, *geometry, *activation, None))
