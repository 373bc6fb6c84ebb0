"""Gradients by name, with their settings: "smoothed(width=0.3, stride=4)"."""

from __future__ import annotations

from collections.abc import Callable

from ebm_defense.attacks import spec
from ebm_defense.attacks.gradients.base import Gradient, Identity
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.attacks.gradients.score_free import ScoreFree
from ebm_defense.attacks.gradients.smoothed import Smoothed
from ebm_defense.attacks.gradients.surrogate import Surrogate


def surrogate(steps: int = 10, through: str = "full") -> Surrogate:
    """Make a surrogate of this many steps, differentiated by the gradient of this name."""
    return Surrogate(steps=steps, through=make_gradient(through))


GRADIENTS: dict[str, Callable[..., Gradient]] = {
    "bpda": Identity,
    "full": Full,
    "smoothed": Smoothed,
    "surrogate": surrogate,
    "score-free": ScoreFree,
}
"""The ways to differentiate a defense, by the names that commands know."""


def make_gradient(text: str) -> Gradient:
    """Make a gradient from "name" or "name(setting=value, …)".

    Raises:
        UsageError: an unknown name or setting, or a value out of range.
    """
    return spec.make(GRADIENTS, text, "gradient")
