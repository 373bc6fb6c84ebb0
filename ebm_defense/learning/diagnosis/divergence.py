"""How far a learned density of points is from the truth, by numerical integration."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine.base import Energy

BOX, CELLS = 1.5, 300
"""Half the side of the square that is integrated over, in [-1, 1] units, and its cells a side."""


class Divergence(NamedTuple):
    """KL(p ‖ q) of the truth p from the density q ∝ exp(−U/T) on a square.

    Attributes:
        kl: in nats; infinite where the energy is not finite.
        mass: what the square holds of the truth; close to 1, or it is too small.
        log_density: log q of every cell, `[cells, cells]`, the second coordinate down.
    """

    kl: float
    mass: float
    log_density: Tensor


def divergence(
    energy: Energy,
    log_density: Callable[[Tensor], Tensor],
    temperature: float,
    *,
    box: float = BOX,
    cells: int = CELLS,
) -> Divergence:
    """Return KL(p ‖ q) of points in the plane, by the midpoint rule.

    Args:
        energy: maps `[n, 2, 1, 1]` to `[n]`.
        log_density: log p, likewise.
        temperature: T > 0.
        box: half the square's side.
        cells: its cells a side.
    """
    x = grid(box, cells)
    with torch.no_grad():
        scaled = -energy(x.float()).double() / temperature
    area = (2 * box / cells) ** 2
    model = scaled - torch.logsumexp(scaled, dim=0) - torch.tensor(area).log()
    truth = log_density(x)
    weights = truth.exp() * area
    kl = float((weights * (truth - model)).nan_to_num(0.0, posinf=torch.inf).sum())
    finite = bool(scaled.isfinite().all())
    return Divergence(
        kl if finite else float("inf"), float(weights.sum()), model.view(cells, cells)
    )


def grid(box: float = BOX, cells: int = CELLS) -> Tensor:
    """Return the centres of a square's cells, float64 `[cells², 2, 1, 1]`."""
    line = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * (2 * box) - box
    down, across = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([across, down], dim=2).view(-1, 2, 1, 1)
