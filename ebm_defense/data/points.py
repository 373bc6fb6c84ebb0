"""Distributions of points whose density is known: a mixture on a circle, and rings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CircleMixture:
    """Gaussians of one spread around equally spaced points of a circle (Nijkamp et al. 2019).

    Attributes:
        modes: how many.
        radius: of the circle.
        spread: standard deviation.
        reach: what 1 stands for: points are divided by it, so that they lie in [-1, 1].
    """

    modes: int = 8
    radius: float = 1.0
    spread: float = 0.15
    reach: float = 2.0

    def centres(self) -> Tensor:
        """Return the modes `[modes, 2]`, before they are divided."""
        angle = torch.arange(self.modes) * (2 * math.pi / self.modes)
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points `[count, 2, 1, 1]` in [-1, 1]."""
        which = torch.randint(self.modes, (count,), generator=generator)
        x = self.centres()[which] + self.spread * torch.randn(count, 2, generator=generator)
        return (x / self.reach).view(count, 2, 1, 1)

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p `[n]` at points `[n, 2, 1, 1]` in [-1, 1]."""
        apart = (self.reach * x.flatten(1))[:, None] - self.centres().to(x)
        square = apart.square().sum(2) / self.spread**2
        normal = math.log(self.modes * 2 * math.pi * self.spread**2) - 2 * math.log(self.reach)
        return torch.logsumexp(-0.5 * square, dim=1) - normal


@dataclass(frozen=True, kw_only=True)
class Rings:
    """Rings around the origin, of radii 1, 2, …, each with as many points (Nijkamp et al. 2019).

    Attributes:
        rings: how many.
        spread: standard deviation of the distance from the origin.
        reach: what 1 stands for: points are divided by it, so that they lie in [-1, 1].
    """

    rings: int = 4
    spread: float = 0.15
    reach: float = 5.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points `[count, 2, 1, 1]` in [-1, 1]."""
        which = torch.randint(1, self.rings + 1, (count,), generator=generator)
        radius = which + self.spread * torch.randn(count, generator=generator)
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
        return (x / self.reach).view(count, 2, 1, 1)

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p `[n]` at points `[n, 2, 1, 1]` in [-1, 1]."""
        # A ring's density is that of its radius, spread over the circle of that radius.
        radius = self.reach * x.flatten(1).norm(dim=1)
        apart = radius[:, None] - torch.arange(1, self.rings + 1).to(x)
        square = apart.square() / self.spread**2
        normal = math.log(self.rings * math.sqrt(2 * math.pi) * self.spread * 2 * math.pi)
        around = radius.clamp_min(1e-12).log()
        return torch.logsumexp(-0.5 * square, dim=1) - normal - around + 2 * math.log(self.reach)


Points = CircleMixture | Rings

POINTS: dict[str, type[Points]] = {"mixture": CircleMixture, "rings": Rings}
"""By the names that benchmarks call them."""
