"""What a model must be to be attacked, asked before any long work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.outputs import reason, told
from ebm_defense.noise import chain_keys

NO_GRADIENT = (
    "the model has no gradient to attack with{}; use an attack that needs none, such as Square, or "
    "replace what cannot be differentiated."
)


def classes_of(defense: PurifiedClassifier, images: Tensor, labels: Tensor) -> int:
    """Send one image through a model, and return how many classes it tells apart.

    Raises:
        UsageError: images that the model cannot take, or labels beyond its classes.
    """
    logits = _first_pass(defense, images[:1])
    classes, highest = logits.shape[1], int(labels.max())
    if classes < 2 or classes <= highest:
        raise UsageError(
            f"the model returned logits of {classes} classes, but the labels go up to {highest}; "
            "it must return [N, classes], two columns where there are two classes."
        )
    return classes


def _first_pass(defense: PurifiedClassifier, images: Tensor) -> Tensor:
    keys = chain_keys(0, "first pass", range(len(images)), range(1))
    with told(images), torch.no_grad():
        return defense.replicate_logits(images, keys)[0]


def needs_gradient(gradient: Any) -> bool:
    """Whether a gradient is taken by differentiating the classifier, and not from its scores."""
    return gradient is not None and not getattr(gradient, "from_scores", False)


def refuse_without_slope(defense: PurifiedClassifier, images: Tensor) -> None:
    """Refuse a classifier that nothing can be differentiated through.

    Raises:
        UsageError: its logits do not depend on the images, as far as torch knows.
    """
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        try:
            logits = defense.classify(x)
            found = torch.autograd.grad(logits.sum(), x, allow_unused=True)[0]
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(NO_GRADIENT.format(f" ({reason(error)})")) from error
    if found is None:
        raise UsageError(NO_GRADIENT.format(""))
