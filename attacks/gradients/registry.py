"""Gradients by name, with their settings, and the one that fits a defense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from ebm_defense.attacks import spec
from ebm_defense.attacks.gradients.base import Gradient, Identity, Purified, VjpGradient
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.attacks.gradients.score_free import ScoreFree
from ebm_defense.attacks.gradients.smoothed import Smoothed
from ebm_defense.attacks.gradients.surrogate import Surrogate
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError

T = TypeVar("T")


def surrogate(steps: int = 10, through: str = "full") -> Surrogate:
    """Make a surrogate of this many steps, differentiated by the gradient of this name."""
    return Surrogate(steps=steps, through=make_gradient(through))


@dataclass(frozen=True, kw_only=True)
class Auto(VjpGradient):
    """The strongest gradient that fits a defense, by what its purifier says of itself.

    An evaluation chooses it once at its start, by `choose_auto`, and records the one chosen.
    """

    name: str = field(default="auto", init=False)

    def purify(self, defense: PurifiedClassifier, images: Tensor, keys: Tensor) -> Purified:
        chosen = fitting_gradient(defense, images)
        if not isinstance(chosen, VjpGradient):
            raise UsageError(f"the gradient {chosen.name}, which fits, has no way back of its own.")
        return chosen.purify(defense, images, keys)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        """Return the cost of the exact gradient, or of the identity where there is no other."""
        try:
            return Full().chain_steps(defense, replicates)
        except UsageError:
            return Identity().chain_steps(defense, replicates)


def fitting_gradient(defense: PurifiedClassifier, images: Tensor) -> Gradient:
    """Return the strongest gradient that fits a defense: the first that its purifier names and
    that can be taken.

    Args:
        defense: what is to be attacked.
        images: `[N, C, H, W]` in [0, 1], of which one is looked at.
    """
    for name in defense.purifier.gradients(images[:1]):
        gradient = make_gradient(name)
        try:
            gradient.chain_steps(defense)
        except UsageError:
            continue
        return gradient
    return Identity()


def choose_auto(value: T, defense: PurifiedClassifier, images: Tensor) -> T:
    """Return frozen settings, such as a protocol, with what fits for each `Auto`.

    Raises:
        UsageError: an attack that cannot take it.
    """
    if isinstance(value, Auto):
        return fitting_gradient(defense, images)  # type: ignore[return-value]
    if isinstance(value, tuple):
        items = [choose_auto(item, defense, images) for item in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else tuple(items)  # type: ignore[return-value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    chosen = {k: choose_auto(v, defense, images) for k, v in fields.items()}
    changed: dict[str, Any] = {k: v for k, v in chosen.items() if v is not fields[k]}
    return dataclasses.replace(value, **changed) if changed else value


GRADIENTS: dict[str, Callable[..., Gradient]] = {
    "auto": Auto,
    "bpda": Identity,
    "full": Full,
    "smoothed": Smoothed,
    "surrogate": surrogate,
    "score-free": ScoreFree,
}
"""The ways to differentiate a defense, by the names that commands know."""


def make_gradient(text: str) -> Gradient:
    """Make a gradient from "name" or "name(setting=value, …)", as in "smoothed(width=0.3)".

    Raises:
        UsageError: an unknown name or setting, or a value out of range.
    """
    return spec.make(GRADIENTS, text, "gradient")
