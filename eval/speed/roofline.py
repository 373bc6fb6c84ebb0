"""What a machine reaches, and what a Langevin step and a Hessian-vector product ask of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from ebm_defense.energies.conv import ConvEnergySettings
from ebm_defense.engine.derivatives import tf32
from ebm_defense.runtime.timing import Clock, alternate

LAYOUTS: dict[str, ConvEnergySettings] = {
    "cifar10": ConvEnergySettings(),
    "cifar10-smooth": ConvEnergySettings(activation="soft_lrelu"),
    **{
        f"fashion-mnist-{width}{suffix}": ConvEnergySettings(
            channels=1, image_size=28, width=width, activation=activation
        )
        for width in (16, 32)
        for suffix, activation in (("", "leaky_relu"), ("-smooth", "soft_lrelu"))
    },
}
"""The published CIFAR-10 network, and those of the shipped energies at two widths."""

BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine reaches in one precision: FLOP a second, and bytes a second copied."""

    precision: str
    matmul: float
    convolution: float
    copy: float


class Work(NamedTuple):
    """What one image asks for: FLOP, and bytes where only maps between layers leave the chip."""

    flops: float
    bytes: float

    def over(self, steps: int) -> Work:
        """Return one step's part of work that is done once for so many."""
        return Work(self.flops / steps, self.bytes / steps)

    def least_seconds(self, ceilings: Ceilings) -> float:
        """Return the roofline: the least time that the ceilings allow."""
        compute = self.flops / max(ceilings.convolution, ceilings.matmul)
        return max(compute, self.bytes / ceilings.copy)


def step_work(s: ConvEnergySettings, precision: str) -> Work:
    """Return the work of one Langevin step.

    FLOP: forward and input gradient of every layer. Bytes: each activation is written and read on
    the way up, read again for its slope, and its gradient written and read on the way down; the
    fp32 state is read and written and its noise read.
    """
    image = 3 * 4 * s.channels * s.image_size**2
    return Work(4 * sum(_products(s)), 5 * BYTES[precision] * _inner(s) + image)


def product_work(s: ConvEnergySettings, precision: str) -> Work:
    """Return the work of one Hessian-vector product.

    FLOP: of every layer the forward pass and the input gradient, then the vector's way up and the
    way down of what the curvature makes of it; the last layer is linear and its gradient constant,
    so that only the first two touch it. Bytes: of each activation the value is written and read by
    all four ways, the gradient and the vector's image are written and read by the next layer and by
    the curvature, and what comes down is written and read; state and vector are read and the
    product is written in fp32.
    """
    *inner, last = _products(s)
    image = 3 * 4 * s.channels * s.image_size**2
    return Work(8 * sum(inner) + 4 * last, 13 * BYTES[precision] * _inner(s) + image)


def _products(s: ConvEnergySettings) -> list[int]:
    """Return the multiplications of each layer's forward pass."""
    size, products = s.image_size, [s.image_size**2 * 9 * s.channels * s.width]
    for i in range(3):
        size //= 2
        products.append(size**2 * 16 * (s.width * 2**i) * (s.width * 2 ** (i + 1)))
    return [*products, s.width * 8 * size**2]


def _inner(s: ConvEnergySettings) -> int:
    """Return how many numbers all maps between layers hold."""
    return sum((s.image_size // 2**i) ** 2 * s.width * 2**i for i in range(4))


def measure_ceilings(
    precision: str, seconds: float, device: torch.device, clock: Clock = time.perf_counter
) -> Ceilings:
    """Measure what a square matrix product, a dense convolution and a copy reach here."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    big = device.type == "cuda"
    n, batch, count = (8192, 1024, 2**28) if big else (1024, 32, 2**24)
    a = torch.randn(n, n, device=device).to(dtype)
    images = torch.randn(batch, 64, 28, 28, device=device).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 64, 3, 3, device=device).to(dtype)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    with torch.no_grad(), tf32(precision == "tf32", device):
        t = alternate(
            {
                "matmul": lambda: a @ a,
                "convolution": lambda: F.conv2d(images, kernel, None, 1, 1),
                "copy": lambda: target.copy_(source),
            },
            seconds, device, clock,
        )  # fmt: skip
    products = batch * 28 * 28 * 9 * 64 * 128
    return Ceilings(
        precision=precision,
        matmul=2 * n**3 / t["matmul"],
        convolution=2 * products / t["convolution"],
        copy=2 * 4 * count / t["copy"],
    )
