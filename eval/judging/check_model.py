"""A model's first images, before any long work."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import chain_keys

PASSES, IMAGES = 8, 16


def check_model(defense: PurifiedClassifier, images: Tensor, labels: Tensor) -> None:
    """Send one image through a model, refuse what does not fit, and learn if it is random.

    A purifier that calls itself deterministic, or a foreign model, is taken at its word only if
    eight passes of up to 16 images agree; else it gets as many replicates as any random defense.

    Raises:
        UsageError: images the model cannot take, or labels beyond its classes.
    """
    logits = _first_pass(defense, images[:1])
    bare = _first_pass(PurifiedClassifier(defense.undefended, torch.nn.Identity()), images[:1])
    highest = int(labels.max())
    for found in (logits, bare):
        if found.ndim != 2 or found.shape[1] <= highest:
            raise UsageError(
                f"the model returned logits of shape {tuple(found.shape)}, but the labels go up to "
                f"{highest}; it must return [N, classes]."
            )
    if not defense.purifier.stochastic:
        first, *rest = (_pass(defense, images[:IMAGES]) for _ in range(PASSES))
        defense.purifier.stochastic = not all(torch.equal(first, again) for again in rest)


def _pass(defense: PurifiedClassifier, images: Tensor) -> Tensor:
    keys = chain_keys(0, "probe", range(len(images)), range(1))
    with torch.no_grad():
        return defense.replicate_logits(images, keys)[0]


def _first_pass(defense: PurifiedClassifier, images: Tensor) -> Tensor:
    try:
        return _pass(defense, images)
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"the model cannot take images of shape {tuple(images.shape[1:])}: {reason}."
        ) from error
