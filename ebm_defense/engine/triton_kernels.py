"""Fused element-wise kernels for GPUs: LeakyReLU with its bias, the smooth one with its slope, and
the update with its noise.

Written in Triton, which comes with CUDA builds of torch. They save reading and writing maps between
kernels that do one operation each; without Triton, or where a kernel fails, torch's own are used.
"""

# mypy: ignore-errors
# Triton's language has no types.
from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.engine.report import fell_back
from ebm_defense.engine.trust import trusted
from ebm_defense.noise import KeyedNoise

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

VERSION = "none" if triton is None else triton.__version__
BLOCK = 1024

if triton is not None:

    @triton.jit
    def _bias_leaky(z, bias, count, channels, slope, block: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < count
        value = tl.load(z + at, mask=inside).to(tl.float32)
        value += tl.load(bias + at % channels, mask=inside).to(tl.float32)
        value = tl.where(value > 0, value, value * slope)
        tl.store(z + at, value.to(z.dtype.element_ty), mask=inside)

    @triton.jit
    def _soft_leaky(z, slope, count, a, e, block: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < count
        value = tl.load(z + at, mask=inside).to(tl.float32)
        r = tl.sqrt(value * value + e * e)
        bent = (1.0 - a) * value + a * (r - e)
        tl.store(z + at, bent.to(z.dtype.element_ty), mask=inside)
        tilt = (1.0 - a) + a * (value / r)
        tl.store(slope + at, tilt.to(slope.dtype.element_ty), mask=inside)

    @triton.jit
    def _mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        return z ^ (z >> 31)

    @triton.jit(do_not_specialize=["ahead"])
    def _move(x, gradient, keys, number, ahead, size, drift, step_size, block: tl.constexpr):
        chain = tl.program_id(0).to(tl.int64)
        half = (size + 1) // 2
        pair = tl.program_id(1) * block + tl.arange(0, block)
        golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
        step = (tl.load(number) + ahead + 1).to(tl.uint64)
        key = _mix(tl.load(keys + chain).to(tl.uint64) + golden * step)
        bits = _mix(key + (pair + 1).to(tl.uint64) * golden)
        high = ((bits >> 32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
        low = (bits & 0xFFFFFFFF).to(tl.float32) * 1.4629180792671596e-09
        radius = tl.sqrt(-2.0 * tl.log(high))
        first, second = chain * size + pair, chain * size + half + pair
        in_first, in_second = pair < half, half + pair < size
        a, b = tl.load(x + first, mask=in_first), tl.load(x + second, mask=in_second)
        a -= drift * tl.load(gradient + first, mask=in_first).to(tl.float32)
        b -= drift * tl.load(gradient + second, mask=in_second).to(tl.float32)
        tl.store(x + first, a + step_size * radius * tl.cos(low), mask=in_first)
        tl.store(x + second, b + step_size * radius * tl.sin(low), mask=in_second)


@cache
def works(device: torch.device) -> bool:
    """Whether all kernels run on a device and agree with torch's own operations, tried once."""
    if triton is None or device.type != "cuda" or not trusted(device, "Triton"):
        return False
    try:
        agrees = agrees_with_torch(device)
    except Exception as error:  # compilers fail in too many ways to name
        fell_back("Triton", str(device), str(error).partition("\n")[0])
        return False
    if not agrees:
        fell_back("Triton", str(device), "its numbers are not torch's")
    return agrees


def agrees_with_torch(device: torch.device) -> bool:
    """Run all kernels on a few numbers and compare them with what they replace."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 3, 5, generator=generator).to(device)
    z = z.contiguous(memory_format=torch.channels_last)
    bias = torch.randn(4, generator=generator).to(device)
    bent = F.leaky_relu(z + bias[:, None, None], 0.05)
    x, slope = torch.randn(2, 3, 3, 3, 5, generator=generator).to(device)[:, :2]
    noise = KeyedNoise(torch.tensor([7, -3], device=device))
    moved = x - 0.5 * slope + 0.1 * noise.normal(9, x)
    move_(x, slope, noise.keys, torch.tensor([7], device=device), 2, 0.5, 0.1)
    same = torch.allclose(bias_leaky_(z, bias, 0.05), bent, atol=1e-6)
    return same and _soft_agrees(z) and torch.allclose(x, moved, atol=1e-5)


def _soft_agrees(z: Tensor, a: float = 0.475, e: float = 0.1) -> bool:
    r = (z.double().square() + e * e).sqrt()
    exact = (1 - a) * z.double() + a * (r - e), (1 - a) + a * z.double() / r
    found = soft_leaky_(z.clone(), a, e)
    return all(torch.allclose(f.double(), t, atol=1e-6) for f, t in zip(found, exact, strict=True))


def fuses(x: Tensor) -> bool:
    """Whether `move_` takes these states."""
    return x.dtype == torch.float32 and x.is_contiguous() and works(x.device)


def _launching(x: Tensor) -> AbstractContextManager[object]:
    """Launch where the tensor is: Triton launches on the process's current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def bias_leaky_(z: Tensor, bias: Tensor, slope: float) -> Tensor:
    """Return z `[b, C, H, W]` with a bias `[C]` added and bent; in place if in channels_last."""
    z = z.contiguous(memory_format=torch.channels_last)
    count, channels = z.numel(), z.shape[1]
    if count:
        with _launching(z):
            _bias_leaky[(triton.cdiv(count, BLOCK),)](z, bias, count, channels, slope, block=BLOCK)
    return z


def soft_leaky_(z: Tensor, a: float, e: float) -> tuple[Tensor, Tensor]:
    """Return (1 − a)·z + a·(√(z² + e²) − e), in the memory of z, and its slope, each rounded once.

    Args:
        z: `[b, C, H, W]` in channels_last, whose numbers lie without gaps.
        a: (1 − slope at −∞)/2.
        e: half-width of the bend, above 0.
    """
    z = z.contiguous(memory_format=torch.channels_last)
    slope, count = torch.empty_like(z), z.numel()
    if count:
        with _launching(z):
            _soft_leaky[(triton.cdiv(count, BLOCK),)](z, slope, count, a, e, block=BLOCK)
    return z, slope


def move_(
    x: Tensor,
    gradient: Tensor,
    keys: Tensor,
    number: Tensor,
    ahead: int,
    drift: float,
    step_size: float,
) -> None:
    """Take x ← x − drift·gradient + step_size·z in place, z being `KeyedNoise`'s at that step.

    Args:
        x: fp32 `[b, C, H, W]`, contiguous.
        gradient: likewise, fp32 or bf16.
        keys: int64 `[b]`.
        number: int64 `[1]`, a step, on the device, so that a CUDA graph can count it up.
        ahead: how many steps after it this one comes.
        drift: the factor of the gradient.
        step_size: the factor of the noise.
    """
    size = math.prod(x.shape[1:])
    grid = (len(x), triton.cdiv((size + 1) // 2, BLOCK))
    with _launching(x):
        _move[grid](
            x, gradient.contiguous(), keys, number, ahead, size, drift, step_size, block=BLOCK
        )
