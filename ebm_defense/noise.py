"""Random streams: noise as a function of what it is for, never of batch or worker."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

_log = logging.getLogger("ebm_defense")

LACKS_64_BITS = frozenset({"mps"})
"""Kinds of devices without float64 and with few operations on 64-bit integers."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Noise(Protocol):
    """Standard normal noise for one step of a batch of chains."""

    def normal(self, step: int, like: Tensor) -> Tensor:
        """Draw `[b, C, H, W]` noise of `like`'s shape, dtype and device for `step` ≥ 0."""
        ...

    def chunk(self, rows: slice) -> Noise:
        """Return the noise of these rows of the batch alone."""
        ...


_AHEAD = 1 << 17
"""How many normals are drawn at a time: enough to hide the calls, few enough for the cache."""


def ahead(noise: Noise, steps: range, like: Tensor) -> Iterator[Tensor]:
    """Yield `noise.normal(step, like)` for each step, keyed noise several steps at a time."""
    if not isinstance(noise, KeyedNoise):
        yield from (noise.normal(step, like) for step in steps)
        return
    size = max(1, _AHEAD // max(like.numel(), 1))
    for k in range(0, len(steps), size):
        yield from noise.normals(steps[k : k + size], like)


def drawn_at(device: torch.device, noise: Noise, chains: int) -> Noise:
    """Return a chain's noise, drawn on the chain's device if it can be.

    A generator of another device would hold every step up; it draws a key for each chain instead.
    """
    if not isinstance(noise, GeneratorNoise) or noise.generator.device.type == device.type:
        return noise
    where = noise.generator.device
    draw = torch.randint(-(2**63), 2**63 - 1, (chains,), generator=noise.generator, device=where)
    return KeyedNoise(draw.to(device))


@dataclass(frozen=True)
class GeneratorNoise:
    """Noise drawn in order from one `torch.Generator`; it depends on the batch."""

    generator: torch.Generator

    def normal(self, step: int, like: Tensor) -> Tensor:
        device = self.generator.device
        work = working_dtype(like.dtype)
        draw = torch.randn(like.shape, dtype=work, device=device, generator=self.generator)
        return draw.to(like.device, like.dtype)

    def chunk(self, rows: slice) -> GeneratorNoise:
        return self


@dataclass(frozen=True)
class KeyedNoise:
    """Noise of chain `i` at step `k` as a pure function of `(keys[i], k)`.

    A counter-based generator: SplitMix64 (Steele, Lea, Flood 2014, with the constants of
    Stafford's mixer 13) maps (key, step, pixel pair) to 64 bits and Box-Muller maps those to
    two normals. It draws the same integers on every device, in every batch.

    Attributes:
        keys: one 64-bit integer a chain, int64 `[b]`; see `chain_keys`.
    """

    keys: Tensor

    def normal(self, step: int, like: Tensor) -> Tensor:
        return self.normals(range(step, step + 1), like)[0]

    def normals(self, steps: range | Tensor, like: Tensor) -> Tensor:
        """Draw the noise of several steps, `[len(steps), b, C, H, W]`: `normal` of each."""
        size = math.prod(like.shape[1:])
        bits = _moved(self._bits(steps, (size + 1) // 2), like.device)
        normals = _box_muller(bits, like.dtype)[..., :size]
        return normals.view(len(steps), *like.shape).to(like.device)

    def bits(self, step: int, count: int) -> Tensor:
        """Return `count` 64-bit words a chain for `step`, int64 `[b, count]`."""
        return self._bits(range(step, step + 1), count)[0]

    def _bits(self, steps: range | Tensor, count: int) -> Tensor:
        """Return `[len(steps), b, count]`; steps on the keys' device if they are a tensor."""
        keys, golden = self.keys, _signed(_GOLDEN)
        if keys.device.type in LACKS_64_BITS:
            _say_elsewhere(keys.device.type)
            keys = keys.cpu()
        device = keys.device
        if isinstance(steps, range):
            steps = torch.arange(steps.start, steps.stop, device=device)
        step_keys = _splitmix(keys + (steps[:, None] + 1) * golden)
        counter = torch.arange(1, count + 1, device=device) * golden
        return _splitmix(step_keys[..., None] + counter)

    def uniform(self, step: int, like: Tensor) -> Tensor:
        """Draw `[b, …]` uniform noise in [0, 1) of `like`'s shape for `step`."""
        bits = _moved(self.bits(step, math.prod(like.shape[1:])), like.device)
        draws = ((bits >> 40) & 0xFFFFFF).to(working_dtype(like.dtype)) * 2.0**-24
        # Half precision rounds the largest draws up to 1, which is outside.
        below_one = 1.0 - torch.finfo(like.dtype).eps / 2.0
        return draws.to(like.device, like.dtype).clamp_max(below_one).view(like.shape)

    def chunk(self, rows: slice) -> KeyedNoise:
        return KeyedNoise(self.keys[rows])


def chain_keys(seed: int, purpose: str, images: Sequence[int], replicates: range) -> Tensor:
    """Return one key for each replicate of each image, int64 `[r, b]`.

    A key is the first 64 bits of BLAKE2b over (seed, purpose, image, replicate), so chains of
    different purposes, images or replicates are independent whatever is run beside them.
    """
    return torch.tensor(
        [[_key(seed, purpose, image, r) for image in images] for r in replicates],
        dtype=torch.int64,
    ).view(len(replicates), len(images))


def _key(*parts: int | str) -> int:
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which numbers of a dtype are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def derive_seed(seed: int, purpose: str) -> int:
    """Return a seed for one purpose of a run, independent of every other purpose's."""
    return _key(seed, purpose) & (2**63 - 1)


def fresh_seed() -> int:
    """Return a seed from the operating system's entropy."""
    return torch.Generator().seed() & (2**63 - 1)


def _moved(bits: Tensor, device: torch.device) -> Tensor:
    """Move 64-bit words to a device that has them; elsewhere only the floats are moved."""
    return bits if device.type in LACKS_64_BITS else bits.to(device)


@cache
def _say_elsewhere(kind: str) -> None:
    _log.warning("%s lacks 64-bit arithmetic; its noise is made on the CPU and moved there.", kind)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_xor(z: Tensor, bits: int) -> Tensor:
    return z.bitwise_xor((z >> bits).bitwise_and_((1 << (64 - bits)) - 1))


def _splitmix(z: Tensor) -> Tensor:
    z = _shift_xor(z, 30).mul_(_signed(_MIX_1))
    z = _shift_xor(z, 27).mul_(_signed(_MIX_2))
    return _shift_xor(z, 31)


def _box_muller(bits: Tensor, dtype: torch.dtype) -> Tensor:
    work = working_dtype(dtype)
    # 32 bits round up to 1.0 in float32, whose logarithm is 0: a valid, never infinite, radius.
    high = ((bits >> 32) & 0xFFFFFFFF).to(work).add_(0.5).mul_(2.0**-32)
    angle = (bits & 0xFFFFFFFF).to(work).mul_(2.0 * math.pi * 2.0**-32)
    radius = high.log_().mul_(-2.0).sqrt_()
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1).to(dtype)
