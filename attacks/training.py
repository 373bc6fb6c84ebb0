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
from ebm_defense.interface.numbers import plain_numbers


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
        plain_numbers(self)
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
        start = 2.0 * torch.rand(images.shape, generator=generator, dtype=torch.float32) - 1.0
        delta = norm.project(start.to(images) * eps, eps, -inf, inf)
        for _ in range(self.steps):
            delta.requires_grad_()
            loss = F.cross_entropy(classifier(images + delta).float(), labels)
            (gradient,) = torch.autograd.grad(loss, delta)
            step = 1.25 * eps / self.steps * self.threat.direction(gradient)
            delta = norm.project(delta.detach() + step, eps, -inf, inf)
        return images + delta


@dataclass(frozen=True, kw_only=True)
class InputPerturbation:
    """PGD on a whole defense's input, for learning the defense (Madry et al. 2018).

    Its steps are 1.25·eps for one (Wong, Rice, Kolter 2020) and 1.5·eps/steps for more, after a
    start at random within the ball; every step meets fresh noise.

    Attributes:
        norm: a name in `NORMS`.
    """

    norm: str = "Linf"

    def __call__(
        self,
        predict: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        steps: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Return `images` `[b, C, H, W]` perturbed within eps and [0, 1] to raise the loss."""
        threat = ThreatModel(norm=self.norm, eps=eps)
        start = 2.0 * torch.rand(images.shape, generator=generator, dtype=torch.float32) - 1.0
        x = threat.project(images + start.to(images) * eps, images)
        size = eps * (1.25 if steps == 1 else 1.5 / steps)
        for _ in range(steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(predict(x), labels).sum(), x)
            x = threat.step(x.detach(), images, gradient, size)
        return x
