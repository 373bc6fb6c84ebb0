"""How an attacker differentiates a stochastic defense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError


class GradientEstimate(NamedTuple):
    """What one query of the defense shows: the gradient `[b, C, H, W]` of the loss summed over
    images, and the replicate logits `[r, b, classes]` on the way.
    """

    gradient: Tensor
    logits: Tensor


class Gradient(Protocol):
    """One way to differentiate the defense; `name` stands in tables."""

    @property
    def name(self) -> str: ...

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        """Estimate it at `images` `[b, C, H, W]` through the noise of `keys` `[r, b]`."""
        ...

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of a query of one image by so many replicates, in Langevin steps.

        Raises:
            UsageError: the defense has no such gradient; asked first, so that no work is lost.
        """
        ...


class Purified(NamedTuple):
    """Purified replicates, and the way back to the images.

    Attributes:
        images: `[r, b, C, H, W]`.
        vjp: maps a cotangent at the purified replicates `[r, b, C, H, W]` to one at the images,
            `[r, b, C, H, W]`, each replicate through its own chain.
    """

    images: Tensor
    vjp: Callable[[Tensor], Tensor]


class VjpGradient:
    """A gradient that goes back through the purifier by a vector-Jacobian product of its own."""

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        """Purify `images` `[b, C, H, W]` with the noise of `keys` `[r, b]`."""
        raise NotImplementedError

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of a query of one image by so many replicates, in Langevin steps."""
        raise NotImplementedError

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        purified, vjp = self.purify(defense, images, keys)
        cotangent, logits = at_purified(defense, purified, labels, loss)
        return GradientEstimate(vjp(cotangent).sum(0), logits)


def at_purified(
    defense: PurifiedClassifier, purified: Tensor, labels: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return the loss's gradient at purified replicates `[r, b, C, H, W]`, and their logits.

    Raises:
        UsageError: the classifier has no gradient.
    """
    with torch.enable_grad():
        purified = purified.detach().requires_grad_()
        logits = defense.classify_replicates(purified)
        if not logits.requires_grad:
            raise UsageError(
                "the model has no gradient to attack with; use an attack that needs none."
            )
        (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), purified)
    return gradient, logits.detach()


@dataclass(frozen=True, kw_only=True)
class Identity(VjpGradient):
    """BPDA with the identity: the gradient at each purified replicate, carried to the input as it
    is and summed over replicates (Athalye, Carlini, Wagner 2018; Hill, Mitchell, Zhu 2021).

    It costs the forward chain alone and holds none of its states.
    """

    name: str = "BPDA"

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        with torch.no_grad():
            return Purified(defense.purify_replicates(images, keys), lambda cotangent: cotangent)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        return replicates * defense.purifier.chain_steps
