"""Perturbations for adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.attacks.norms import NORMS
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainingPerturbation:
    """PGD on a classifier's own cross-entropy, for adversarial training (Madry et al. 2018).

    Unlike an attack it does not clip to [0, 1]: a purified image may lie outside.

    Attributes:
        threat: norm and eps, around the image that the classifier sees.
        steps: gradient steps, at least 1, each of 1.25·eps/steps (1.25·eps for one step, as in
            Wong, Rice, Kolter 2020), after a start at random within the ball.
    """

    threat: ThreatModel
    steps: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"adversarial training needs at least 1 step, not {self.steps}.")

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Return `images` `[b, C, H, W]` perturbed to raise the loss."""
        norm, eps = NORMS[self.threat.norm], self.threat.eps
        start = 2.0 * torch.rand(images.shape, generator=generator) - 1.0
        delta = norm.project(start.to(images) * eps, eps, -inf, inf)
        for _ in range(self.steps):
            delta.requires_grad_()
            loss = F.cross_entropy(classifier(images + delta).float(), labels)
            (gradient,) = torch.autograd.grad(loss, delta)
            step = 1.25 * eps / self.steps * self.threat.direction(gradient)
            delta = norm.project(delta.detach() + step, eps, -inf, inf)
        return images + delta
