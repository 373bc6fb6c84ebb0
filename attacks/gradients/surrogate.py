"""A gradient taken through a cheaper process than the defense's own."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebm_defense.attacks.gradients.base import Gradient, GradientEstimate
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """The gradient through fewer, larger steps of the same total time Σε², run end to end.

    The cheap chain runs from the image to its own end, is classified there, and is differentiated
    all the way; no state of the true chain enters it. The query's logits are the true defense's
    on the same image and keys, so that the judge screens what the defense would have said; a query
    costs both, and holds what `through` holds of the cheap chain.

    Attributes:
        steps: of the cheap chain, at least 1 and at most the defense's own.
        through: how the cheap chain is differentiated.
    """

    steps: int = 10
    through: Gradient = field(default_factory=Full)

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.steps < 1:
            raise UsageError(f"a surrogate needs at least 1 step, not {self.steps}.")

    @property
    def through_chain(self) -> bool:
        return self.through.through_chain

    @property
    def own_curvature(self) -> bool:
        return self.through.own_curvature

    @property
    def name(self) -> str:
        return f"surrogate of {self.steps} steps, {self.through.name}"

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        """Estimate it at `images` `[b, C, H, W]` through the noise of `keys` `[r, b]`.

        Raises:
            UsageError: the defense runs no Langevin chain, or the cheap one diverges.
        """
        gradient = self.through(self.cheap(defense), images, labels, keys, loss).gradient
        if not gradient.isfinite().all():
            raise UsageError(
                f"the surrogate's {self.steps} large steps diverge; give it more steps."
            )
        with torch.no_grad():
            return GradientEstimate(gradient, defense.replicate_logits(images, keys))

    def cheap(self, defense: PurifiedClassifier) -> PurifiedClassifier:
        """Return the defense with the cheap chain in the place of its own.

        Raises:
            UsageError: the purifier has none, or runs a shorter one.
        """
        purifier = defense.purifier.shortened(self.steps)
        return PurifiedClassifier(defense.classifier, purifier, max_chains=defense.max_chains)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of a query of one image, in Langevin steps: cheap and true chain.

        Raises:
            UsageError: the defense runs no Langevin chain, or a shorter one.
        """
        true = replicates * defense.purifier.chain_steps
        return true + self.through.chain_steps(self.cheap(defense), replicates)
