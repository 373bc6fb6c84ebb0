"""A convolution's input gradient as one dense convolution that makes blocks of pixels at a time.

The gradient of a convolution with stride s, kernel k and padding p is
dx[u] = Σ_i g[i]·w[u + p − s·i]. For the B×B pixels u = B·q − o + r, 0 ≤ r < B, only the positions
i = (B/s)·q + j of a fixed small range of j matter, so all pixels of a block are the output channels
(r, c) of one convolution of g with stride B/s. Libraries run that dense convolution near their peak
where their own strided or few-channelled input gradients reach a third of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LANES = {"cpu": 16, "cuda": 64}
"""Output channels that a kind of device computes together, fewer of which cost as much: a CPU's
vectors, and a tile of a GPU's tensor cores."""


@dataclass(frozen=True)
class Convolution:
    """The shape of a square convolution: channels in and out, kernel, stride, padding, map size."""

    fan_in: int
    fan_out: int
    kernel: int
    stride: int
    padding: int
    size: int

    @property
    def out(self) -> int:
        """Return the height of the output map."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Blocks:
    """How to cut a convolution's input into blocks: B, the offset o, and how many cover it."""

    conv: Convolution
    block: int
    offset: int

    @property
    def count(self) -> int:
        """Return how many blocks cover the height of the input."""
        return -(-(self.conv.size + self.offset) // self.block)

    @property
    def reach(self) -> tuple[int, int]:
        """Return the first and last j of the output positions that a block's pixels touch."""
        c, shift = self.conv, self.conv.padding - self.offset
        return -((c.kernel - 1 - shift) // c.stride), (self.block - 1 + shift) // c.stride

    @property
    def kernel(self) -> int:
        """Return the height of the dense convolution's kernel."""
        first, last = self.reach
        return last - first + 1

    @property
    def stride(self) -> int:
        """Return the stride of the dense convolution."""
        return self.block // self.conv.stride

    def products(self, together: int) -> int:
        """Return the multiplications an image, counting lanes that lie idle."""
        lanes = -(-(self.block**2) * self.conv.fan_in // together) * together
        return self.count**2 * self.kernel**2 * self.conv.fan_out * lanes

    def weight(self, weight: Tensor) -> Tensor:
        """Rearrange `[fan_out, fan_in, k, k]` to `[B·B·fan_in, fan_out, kernel, kernel]`."""
        c, b, (first, last) = self.conv, self.block, self.reach
        pixel = torch.arange(b, device=weight.device)[:, None]
        position = torch.arange(first, last + 1, device=weight.device)
        tap = pixel + c.padding - self.offset - c.stride * position
        tap = torch.where((tap < 0) | (tap >= c.kernel), c.kernel, tap)  # a tap of zeros
        padded = F.pad(weight, (0, 1, 0, 1))
        taps = padded[:, :, tap][..., tap]  # [fan_out, fan_in, B, j, B, j]
        return taps.permute(2, 4, 1, 0, 3, 5).reshape(
            b * b * c.fan_in, c.fan_out, *[self.kernel] * 2
        )

    def pad(self, gradient: Tensor) -> tuple[Tensor, int]:
        """Return g and the padding with which the dense convolution makes `count` blocks."""
        before = -self.reach[0]
        needed = (self.count - 1) * self.stride + self.kernel
        after = needed - before - gradient.shape[-1]
        if before == after and before >= 0:
            return gradient, before
        return F.pad(gradient, (before, after, before, after)), 0

    def assemble(self, blocks: Tensor) -> Tensor:
        """Lay blocks `[b, B·B·C, count, count]` (channels_last) out as `[b, C, size, size]`."""
        b, n, run = self.block, self.count, self.block * self.conv.fan_in
        cells = _widened(blocks.permute(0, 2, 3, 1).reshape(-1, n, n, b, run))
        rows = cells.permute(0, 1, 3, 2, 4).reshape(-1, n * b, n * cells.shape[-1])
        pixels = rows.view(blocks.dtype).view(-1, n * b, n * b, self.conv.fan_in)
        inside = slice(self.offset, self.offset + self.conv.size)
        return pixels[:, inside, inside].permute(0, 3, 1, 2)


def _widened(x: Tensor) -> Tensor:
    # torch copies eight bytes at a time three times as fast as bf16 numbers one by one.
    return x.view(torch.int64) if x.shape[-1] * x.element_size() % 8 == 0 else x


def best_blocks(conv: Convolution, device: str = "cpu") -> Blocks | None:
    """Return the blocks of fewest products, or None where the library's own gradient is cheaper.

    With f input channels the library needs about 1 + 16/f times as long for the same products:
    2 at 16 channels, 1.1 at 128, measured with oneDNN in fp32 and bf16. On a GPU, where nothing was
    measured, it is taken to need as much more as its wider lanes.

    Args:
        conv: the convolution.
        device: the kind, as torch names it.
    """
    together = LANES.get(device, LANES["cpu"])
    sizes = [conv.stride * 2**i for i in range(3) if conv.stride * 2**i <= max(conv.size, 2)]
    candidates = [Blocks(conv, b, o) for b in sizes for o in range(b)]
    best = min(candidates, key=lambda blocks: blocks.products(together))
    lanes = -(-conv.fan_in // together) * together
    native = (1 + together / lanes) * conv.out**2 * conv.kernel**2 * conv.fan_out * lanes
    return best if best.products(together) < native else None
