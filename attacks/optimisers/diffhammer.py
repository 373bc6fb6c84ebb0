"""DiffHammer: the gradient of the replicates that can be broken together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.attacks.checks import check_positive
from ebm_defense.attacks.gradients.base import (
    Gradient,
    GradientEstimate,
    Identity,
    VjpGradient,
    at_purified,
    scaled_vjp,
)
from ebm_defense.attacks.losses import Loss, Margin
from ebm_defense.attacks.optimisers.apgd import APGD
from ebm_defense.attacks.session import QueryResult
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

AGREEMENTS = 5  # rounds of weighing, as published


@dataclass(frozen=True, kw_only=True)
class Selective:
    """The gradient of replicates that agree, taken back through one of them.

    At each purified replicate i take a loss L_i, positive where it is wrong, and its gradient g_i.
    The replicate i* whose own step promises most, Σ_i elu(L_i + eps·d(g_i*)·g_i) with d the
    steepest direction, begins; then r ← Σ q_i g_i/Σ q_i with q_i = σ(λ(L_i + d(r)·g_i)), five
    times; and r goes back through the chain of i* alone.

    Attributes:
        gradient: the way back.
        threat: gives eps and d.
        sharpness: λ > 0.
    """

    gradient: VjpGradient
    threat: ThreatModel
    sharpness: float
    name: str = field(default="selective", init=False)

    def __post_init__(self) -> None:
        plain_numbers(self)

    @property
    def through_chain(self) -> bool:
        return self.gradient.through_chain

    @property
    def own_curvature(self) -> bool:
        return self.gradient.own_curvature

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        every = replicates * defense.purifier.chain_steps
        return every + self.gradient.chain_steps(defense)

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        with torch.no_grad():
            purified = defense.purify_replicates(images, keys)

        def total(logits: Tensor, labels: Tensor) -> Tensor:
            return each_loss(loss, logits, labels).sum(0)

        slopes, logits = at_purified(defense, purified, labels, total)
        losses = each_loss(loss, logits, labels)
        begun = first_choice(losses, slopes, self.threat)
        agreed = agreement(losses, slopes, begun, self.threat, self.sharpness)
        own = keys[begun.to(keys.device), torch.arange(keys.shape[1])][None]
        _, vjp = self.gradient.purify(defense, images, own)
        return GradientEstimate(scaled_vjp(vjp, agreed[None])[0], logits)


def each_loss(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss `[r, b]` of every replicate by itself."""
    single = loss(logits.flatten(0, 1)[None], labels.repeat(len(logits)))
    return single.view(logits.shape[:2])


def first_choice(losses: Tensor, slopes: Tensor, threat: ThreatModel) -> Tensor:
    """Return the replicate `[b]` along whose steepest direction most would be broken.

    Args:
        losses: L_i, `[r, b]`.
        slopes: g_i, `[r, b, C, H, W]`.
        threat: gives eps and the steepest direction.
    """
    steps = threat.direction(slopes.flatten(0, 1)).view_as(slopes).flatten(2)
    gains = torch.einsum("jbd,ibd->jib", steps, slopes.flatten(2))
    return F.elu(losses + threat.eps * gains).sum(1).argmax(0)


def agreement(
    losses: Tensor, slopes: Tensor, begun: Tensor, threat: ThreatModel, sharpness: float
) -> Tensor:
    """Return the slope `[b, C, H, W]` on which the replicates agree that can be broken together."""
    agreed = slopes[begun, torch.arange(slopes.shape[1], device=slopes.device)]
    for _ in range(AGREEMENTS):
        gains = (threat.direction(agreed) * slopes).flatten(2).sum(2)
        # A softmax of logarithms, since all the weights may be too small to divide by their sum.
        weights = F.logsigmoid(sharpness * (losses + gains)).softmax(0)
        agreed = (weights[..., None, None, None] * slopes).sum(0)
    return agreed


@dataclass(frozen=True, kw_only=True)
class DiffHammer(APGD):
    """APGD on the gradient of the replicates that can be broken together (Wang et al. 2024).

    A query runs every replicate once, and one of them again, through which it goes back. Gradients
    are mixed over steps: g ← t^−α·g + (1 − t^−α)·g_before.

    Attributes:
        gradient: how the one replicate is differentiated: `Identity` or another `VjpGradient`.
        loss: of one replicate, positive where it is wrong.
        fading: α ≥ 0.
        sharpness: λ > 0, of the weights of the replicates.

    Raises:
        UsageError: a setting out of range, or a gradient that has no way back through one chain.
    """

    steps: int = 50
    replicates: int = 10
    restarts: int = 3
    gradient: Gradient = field(default_factory=Identity)
    loss: Loss = field(default_factory=Margin)
    fading: float = 0.5
    sharpness: float = 5.0

    kind: ClassVar[str] = "DiffHammer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._vjp_gradient()
        check_positive("sharpness", self.sharpness)
        if not 0 <= self.fading < torch.inf:
            raise UsageError(f"an attack's fading must be 0 or more, not {self.fading}.")

    def _vjp_gradient(self) -> VjpGradient:
        if not isinstance(self.gradient, VjpGradient):
            raise UsageError(
                "DiffHammer goes back through single chains, which the gradient "
                f"{self.gradient.name} cannot; give it Identity() or another VjpGradient."
            )
        return self.gradient

    @property
    def _source(self) -> Gradient:
        return Selective(
            gradient=self._vjp_gradient(), threat=self.threat, sharpness=self.sharpness
        )

    def _blend(self, seen: QueryResult, earlier: Tensor, step: int) -> QueryResult:
        # The start is the first query, so that after `step` steps there were step + 1.
        fresh = float((step + 1) ** -self.fading)
        return seen._replace(gradient=fresh * seen.gradient + (1.0 - fresh) * earlier)
