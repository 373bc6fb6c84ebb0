"""SPSA: Adam on gradients that are made of scores alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebm_defense.attacks.gradients.base import Gradient
from ebm_defense.attacks.gradients.score_free import ScoreFree
from ebm_defense.attacks.losses import Loss, Margin
from ebm_defense.attacks.optimisers.ascent import Ascent, Memory
from ebm_defense.errors import UsageError
from ebm_defense.noise import working_dtype

DECAYS = (0.9, 0.999)  # Adam's, as published
ADAM_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class SPSA(Ascent):
    """Adam on score-free gradients (Uesato et al. 2018, algorithm 1).

    Raises:
        UsageError: a gradient that is not `ScoreFree`; other gradients climb by PGD or APGD.
    """

    steps: int = 100
    step_size: float = 0.01
    replicates: int = 1
    gradient: Gradient = field(default_factory=ScoreFree)
    loss: Loss = field(default_factory=Margin)

    kind = "SPSA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.gradient, ScoreFree):
            raise UsageError(
                f"SPSA makes its gradients from scores, by ScoreFree(), not {self.gradient.name}; "
                "give another gradient to PGD or APGD."
            )

    def remember(self, x: Tensor) -> Memory:
        nothing = torch.zeros_like(x, dtype=working_dtype(x.dtype))
        return nothing, nothing

    def move(
        self, x: Tensor, origin: Tensor, gradient: Tensor, memory: Memory, step: int
    ) -> tuple[Tensor, Memory]:
        """Take a step of Adam (Kingma and Ba 2015, algorithm 1), and project."""
        powers = (gradient, gradient.square())
        moments = tuple(
            decay * old + (1.0 - decay) * new
            for decay, old, new in zip(DECAYS, memory, powers, strict=True)
        )
        mean, square = (
            m / (1.0 - decay ** (step + 1)) for decay, m in zip(DECAYS, moments, strict=True)
        )
        moved = x + self.step_size * mean / (square.sqrt() + ADAM_EPS)
        return self.threat.project(moved, origin), moments
