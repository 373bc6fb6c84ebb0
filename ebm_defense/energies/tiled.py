"""An energy of small images, on larger ones."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.errors import UsageError

COVER = 2
"""Tiles a side that cover every pixel: each begins half a tile after the last."""


class Tiled(nn.Module):
    """U(x) = ¼·Σ U(tile) over tiles that overlap by half, so that each pixel lies in four of them.

    The image is reflected beyond its edges, so that pixels there lie in four tiles too: a pixel's
    slope is the mean of four, and one temperature fits images of every size. Chains on it take
    their noise pixel by pixel as others do, whatever the batch.

    Args:
        energy: maps tiles `[n, C, size, size]` in [-1, 1] to `[n]`.
        size: height and width of its images, even.

    Raises:
        UsageError: an odd size; or, when called, images smaller than a tile.
    """

    def __init__(self, energy: nn.Module, size: int) -> None:
        super().__init__()
        if size < 2 or size % COVER:
            raise UsageError(f"tiles must have an even height and width, not {size}.")
        self.energy, self.size = energy, size

    def tiles(self, x: Tensor) -> Tensor:
        """Cut images `[N, C, H, W]` into tiles `[N, T, C, size, size]`."""
        stride, (height, width) = self.size // COVER, x.shape[-2:]
        if min(height, width) < self.size:
            raise UsageError(
                f"images of {width}x{height} are smaller than the energy's {self.size}x{self.size}."
            )
        low = self.size - stride
        pads = [low + math.ceil(side / stride) * stride - side for side in (width, height)]
        padded = F.pad(x, (low, pads[0], low, pads[1]), mode="reflect")
        cut = padded.unfold(2, self.size, stride).unfold(3, self.size, stride)
        return cut.flatten(2, 3).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        tiles = self.tiles(x)
        each: Tensor = self.energy(tiles.flatten(0, 1).contiguous())
        return each.view(tiles.shape[:2]).sum(1) / COVER**2
