"""Gradients by name, with their settings: "smoothed:width=0.3,stride=4"."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from typing import Any

from ebm_defense.attacks.full_gradient import Full
from ebm_defense.attacks.gradients import Gradient, Identity
from ebm_defense.attacks.smoothed import Smoothed
from ebm_defense.attacks.surrogate import Surrogate
from ebm_defense.errors import UsageError

GRADIENTS: dict[str, Callable[..., Gradient]] = {
    "bpda": Identity,
    "full": Full,
    "smoothed": Smoothed,
    "surrogate": Surrogate,
}
"""The ways to differentiate a defense, by the names that commands know."""


def make_gradient(spec: str) -> Gradient:
    """Make a gradient from "NAME" or "NAME:setting=value,…", as in "smoothed:width=0.3,stride=4".

    Raises:
        UsageError: an unknown name or setting, or a value that does not fit.
    """
    name, _, rest = spec.partition(":")
    if name not in GRADIENTS:
        raise UsageError(f"unknown gradient {name!r}; choose one of {', '.join(GRADIENTS)}.")
    kind: Any = GRADIENTS[name]
    settings = dict(_setting(part) for part in rest.split(",")) if rest else {}
    known = [f.name for f in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            raise UsageError(f"gradient {name} has no setting {key!r}; it has {', '.join(known)}.")
    try:
        return GRADIENTS[name](**settings)
    except (TypeError, OverflowError) as error:
        raise UsageError(f"the settings of {spec!r} do not fit: {error}.") from error


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"a gradient's setting is written name=value, not {text!r}.")
    return key.strip(), make_gradient(value) if key.strip() == "through" else _literal(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip()
