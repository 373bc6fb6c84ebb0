"""Convolutions with what follows them, by oneDNN with weights packed once, or by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.engine import triton_kernels

Map = Callable[[Tensor], Tensor]


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
    fused = _fused(weight, bias, stride, padding, shape, slope)
    return fused or _plain(weight, bias, stride, padding, slope)


def _plain(
    weight: Tensor, bias: Tensor | None, stride: int, padding: int, slope: float | None
) -> Map:
    weight = weight.contiguous(memory_format=torch.channels_last)

    def apply(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, bias, stride, padding)
        return y if slope is None else F.leaky_relu_(y, slope)

    def apply_fused(x: Tensor) -> Tensor:
        y = F.conv2d(x, weight, None, stride, padding)
        assert bias is not None
        assert slope is not None
        return triton_kernels.bias_leaky_(y, bias, slope)

    fuses = bias is not None and slope is not None and triton_kernels.works(weight.device)
    return apply_fused if fuses else apply


def _fused(
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
    return lambda x: run(x, packed, bias, *geometry, *activation, None)
