"""A bank of persistent chains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_defense.errors import UsageError

STARTS = ("data", "uniform")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a chain begins: a training image with noise, or uniform pixels in [-1, 1].

    Attributes:
        kind: "data" or "uniform".
        images: training images `[N, C, H, W]` in [-1, 1].
        noise: standard deviation σ of the data noise, in [-1, 1] units.
    """

    kind: str
    images: Tensor
    noise: float

    def __post_init__(self) -> None:
        if self.kind not in STARTS:
            raise UsageError(f"chains start from {' or '.join(STARTS)}, not {self.kind!r}.")

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` fresh states `[count, C, H, W]`."""
        if self.kind == "uniform":
            shape = (count, *self.images.shape[1:])
            return torch.rand(shape, generator=generator) * 2.0 - 1.0
        return noisy_data(self.images, count, self.noise, generator)


def noisy_data(images: Tensor, count: int, noise: float, generator: torch.Generator) -> Tensor:
    """Draw `count` images with replacement and add N(0, σ²) noise."""
    x = images[torch.randint(len(images), (count,), generator=generator)]
    return x + noise * torch.randn(x.shape, generator=generator)


def visit(
    bank: Tensor, start: Start, batch: int, rejuvenation: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose `batch` states without replacement and renew each with probability `rejuvenation`.

    Returns the chosen rows `[batch]` and their states. Renewal comes before the Langevin steps,
    so a state lives K/p steps on average (Hill et al. 2022, mid-run learning).
    """
    rows = torch.randperm(len(bank), generator=generator)[:batch]
    states = bank[rows]
    renewed = torch.rand(batch, generator=generator) < rejuvenation
    if renewed.any():
        states[renewed] = start.draw(int(renewed.sum()), generator)
    return rows, states
