"""How an attacker differentiates a stochastic defense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_defense.attacks.losses import Loss
from ebm_defense.attacks.model_checks import NO_GRADIENT
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError


class GradientEstimate(NamedTuple):
    """What one query of the defense shows: the gradient `[b, C, H, W]` of the loss summed over
    images, and the replicate logits `[r, b, classes]` on the way.
    """

    gradient: Tensor
    logits: Tensor


class Gradient(Protocol):
    """One way to differentiate the defense.

    Attributes:
        name: stands in tables.
        through_chain: whether it goes back through the purifier's steps, and not around them.
        own_curvature: whether it takes the energy's curvature as it is, so that without any it is
            BPDA's.
    """

    @property
    def name(self) -> str: ...

    @property
    def through_chain(self) -> bool: ...

    @property
    def own_curvature(self) -> bool: ...

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

    through_chain: ClassVar[bool] = True
    own_curvature: ClassVar[bool] = True

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
        return GradientEstimate(scaled_vjp(vjp, cotangent).sum(0), logits)


def at_purified(
    defense: PurifiedClassifier, purified: Tensor, labels: Tensor, loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return the loss's gradient at purified replicates `[r, b, C, H, W]`, and their logits.

    The gradient has the logits' dtype, float32 at least.

    Raises:
        UsageError: the classifier has no gradient.
    """
    with torch.enable_grad():
        purified = purified.detach().requires_grad_()
        logits = defense.classify_replicates(purified)
        if not logits.requires_grad:
            raise UsageError(NO_GRADIENT.format(""))
        seen = logits.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(seen, labels).sum(), seen)

        def vjp(cotangent: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(logits, purified, cotangent)
            return gradient

        return scaled_vjp(vjp, slope), seen.detach()


def scaled_vjp(vjp: Callable[[Tensor], Tensor], cotangent: Tensor) -> Tensor:
    """Return `vjp(cotangent)`, a linear map of every image's cotangent, without underflow.

    In float16, of images or inside a model, the gradients of a confident classifier would be 0 and
    the attack blind; so each image's cotangent goes back near 1, scaled by a power of two, which
    changes no digit of what does not underflow.

    Args:
        vjp: maps `[r, b, …]` to `[r, b, …]`.
        cotangent: `[r, b, …]`, in float32 at least.
    """
    size = cotangent.abs().flatten(2).amax((0, 2))
    power = torch.frexp(size.nan_to_num(1.0, 1.0)).exponent
    scale = torch.ldexp(torch.ones_like(size), power)
    pulled = vjp(cotangent / _of_image(scale, cotangent))
    return pulled.to(cotangent.dtype) * _of_image(scale, pulled)


def _of_image(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value an image `[b]` as replicates `[r, b, …]` are."""
    return values.view(-1, *[1] * (like.ndim - 2))


@dataclass(frozen=True, kw_only=True)
class Identity(VjpGradient):
    """BPDA with the identity: the gradient at each purified replicate, carried to the input as it
    is and summed over replicates (Athalye, Carlini, Wagner 2018; Hill, Mitchell, Zhu 2021).

    It costs the forward chain alone and holds none of its states.
    """

    name: str = field(default="BPDA", init=False)

    through_chain = False
    own_curvature = False

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
        at_replicates, logits = at_purified(defense, purified, labels, loss)
        return GradientEstimate(at_replicates.sum(0), logits)

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        with torch.no_grad():
            return Purified(defense.purify_replicates(images, keys), lambda cotangent: cotangent)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        return replicates * defense.purifier.chain_steps
