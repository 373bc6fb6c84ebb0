"""Denoising score matching: the energy's gradient learns to be a denoiser, without any chain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.engine.differentiable import differentiable_gradient
from ebm_defense.learning.draws import Batch
from ebm_defense.learning.energies.objectives import Estimate, Stateless
from ebm_defense.learning.energies.robust import RobustLoss
from ebm_defense.learning.parallel import Team


class ScoreMatching(Stateless):
    """ρ(σ₀²·∇U(x + σz)/(Tσ) − z): what was added is what the gradient points along.

    With one level σ it is the loss of Vincent (2011): exp(−U/T) becomes the density of data with
    that much noise. With several an image's is drawn among them, and the one energy learns the
    direction to the data from all of them, with the length that is right at their geometric mean
    σ₀ (Li, Chen, Sommer 2019, multiscale denoising score matching).

    Args:
        levels: standard deviations σ > 0 of the noise, in [-1, 1] units.
        temperature: T > 0.
        loss: ρ, a mean over pixels; half the square as published.
        team: the processes that learn together, who share a loss that is learned.
    """

    def __init__(
        self,
        levels: Sequence[float],
        temperature: float,
        loss: RobustLoss | None = None,
        team: Team | None = None,
    ) -> None:
        self.levels, self.temperature = tuple(levels), temperature
        self.loss, self.team = loss or RobustLoss(), team or Team()

    @property
    def reference(self) -> float:
        """σ₀, the levels' geometric mean."""
        return math.exp(sum(map(math.log, self.levels)) / len(self.levels))

    def estimate(self, energy: nn.Module, batch: Batch) -> Estimate:
        spread, z = level_of(batch, self.levels), batch.draws.normal("score noise", batch.images)
        gradient = differentiable_gradient(energy)(batch.images + spread * z)
        self.loss.to(z.device)
        loss = self.loss(self.reference**2 / (self.temperature * spread) * gradient - z)
        return Estimate(loss, loss.detach())

    def keep(self) -> None:
        self.team.average(p.grad for p in self.loss.parameters() if p.grad is not None)
        self.loss.descend()

    def drop(self) -> None:
        self.loss.forget()

    def state(self) -> dict[str, Any]:
        return self.loss.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.loss.restore(state)


def level_of(batch: Batch, levels: Sequence[float]) -> Tensor:
    """Draw a noise level for each image of a batch, `[b, 1, 1, 1]`."""
    rows = batch.draws.integers("noise level", len(levels))
    return torch.tensor(levels)[rows].to(batch.images).view(-1, 1, 1, 1)
