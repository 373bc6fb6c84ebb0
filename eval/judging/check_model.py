"""A model's first images, before any long work."""

from __future__ import annotations

from torch import Tensor

from ebm_defense.attacks.model_checks import classes_of
from ebm_defense.defense import PurifiedClassifier


def check_model(defense: PurifiedClassifier, images: Tensor, labels: Tensor) -> int:
    """Send one image through a model, refuse what does not fit, and learn if it is random.

    Returns:
        How many classes it tells apart.

    Raises:
        UsageError: images the model cannot take, or labels beyond its classes.
    """
    classes = classes_of(defense, images, labels)
    classes_of(defense.bare(), images, labels)
    defense.check_deterministic(images, again=True)
    return classes
