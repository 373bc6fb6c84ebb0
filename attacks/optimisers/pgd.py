"""Projected gradient ascent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_defense.attacks.norms import per_image
from ebm_defense.attacks.optimisers.ascent import Ascent, Memory
from ebm_defense.errors import UsageError
from ebm_defense.noise import working_dtype


@dataclass(frozen=True, kw_only=True)
class PGD(Ascent):
    """Projected gradient ascent (Madry et al. 2018) on a loss over replicates (EOT).

    With its defaults the BPDA+EOT attack of Hill, Mitchell, Zhu (2021); with `momentum` the
    iterative attack of Dong et al. (2018), whose gradients are scaled to unit L1 norm and summed.

    Attributes:
        momentum: share of the gathered gradients that a step keeps, from 0 (none) to 1 (published).
    """

    momentum: float = 0.0

    kind = "PGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum <= 1:
            raise UsageError(f"momentum must be from 0 to 1, not {self.momentum}.")

    @property
    def name(self) -> str:
        return f"MI-{super().name}" if self.momentum else super().name

    def remember(self, x: Tensor) -> Memory:
        return (torch.zeros_like(x, dtype=working_dtype(x.dtype)),)

    def move(
        self, x: Tensor, origin: Tensor, gradient: Tensor, memory: Memory, step: int
    ) -> tuple[Tensor, Memory]:
        tiny = torch.finfo(gradient.dtype).tiny
        size = per_image(gradient.flatten(1).abs().sum(1).clamp_min(tiny))
        gathered = self.momentum * memory[0] + gradient / size
        return self.threat.step(x, origin, gathered, self.step_size), (gathered,)
