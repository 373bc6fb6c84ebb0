"""How an attacker differentiates a stochastic defense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError


class Look(NamedTuple):
    """What one look at the defense shows: the gradient `[b, C, H, W]` of the loss summed over
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
    ) -> Look:
        """Look at `images` `[b, C, H, W]` through the noise of `keys` `[r, b]`."""
        ...

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        """Return the cost of one replicate of one image, in Langevin steps."""
        ...


@dataclass(frozen=True, kw_only=True)
class Identity:
    """BPDA with the identity: the gradient at each purified replicate, carried to the input as it
    is and summed over replicates (Athalye, Carlini, Wagner 2018; Hill, Mitchell, Zhu 2021).
    """

    name: str = "BPDA"

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> Look:
        with torch.no_grad():
            purified = defense.purify_replicates(images, keys)
        with torch.enable_grad():
            purified.requires_grad_()
            logits = defense.classify_replicates(purified)
            if not logits.requires_grad:
                raise UsageError(
                    "the model has no gradient to attack with; use an attack that needs none."
                )
            (gradient,) = torch.autograd.grad(loss(logits, labels).sum(), purified)
        return Look(gradient.sum(0), logits.detach())

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        return defense.purifier.chain_steps
