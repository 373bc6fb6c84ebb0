"""Numbers as people bring them: NumPy scalars, tensors of one element, whole floats, "8/255"."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import numpy as np
from torch import Tensor

from ebm_defense.errors import UsageError

MISTAKES = (TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError)
"""What Python, NumPy and torch raise of what is no number."""


def real(value: Any, name: str) -> float:
    """Return a number as a float.

    Args:
        value: a number of Python, NumPy or torch, of one element, or text: "0.03" or "8/255".
        name: what to call it.

    Raises:
        UsageError: anything else.
    """
    try:
        return _real(value)
    except MISTAKES:
        raise UsageError(
            f'{name} must be a number, such as 0.03 or "8/255", not {value!r}.'
        ) from None


def whole(value: Any, name: str) -> int:
    """Return a whole number as an int, whatever brings it: 8, 8.0, NumPy's or torch's 8, "8".

    Raises:
        UsageError: anything else.
    """
    try:
        return _whole(value)
    except MISTAKES:
        raise UsageError(f"{name} must be a whole number, not {value!r}.") from None


def _real(value: Any) -> float:
    if isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        return float(numerator) / (float(denominator) if slash else 1.0)
    return float(_one(value))


def _whole(value: Any) -> int:
    value = _one(value)
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return int(value)
    if hasattr(value, "__index__"):
        return operator.index(value)  # a float would lose the digits of a long seed
    number = _real(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _one(value: Any) -> Any:
    """Return the one element of a tensor or array, and anything else as it is."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item()
    if isinstance(value, bool):
        raise TypeError
    return value


KINDS = {"int": whole, "float": real}


def plain_numbers(settings: Any) -> None:
    """Make plain numbers of the fields of a frozen dataclass that are declared as numbers.

    To be called first in `__post_init__`.

    Raises:
        UsageError: a field that is none.
    """
    for field in dataclasses.fields(settings):
        declared = (
            field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        )
        kind, _, rest = declared.partition(" | ")
        value = getattr(settings, field.name)
        if kind not in KINDS or rest not in ("", "None") or (value is None and rest):
            continue
        named = f"{type(settings).__name__}'s {field.name}"
        object.__setattr__(settings, field.name, KINDS[kind](value, named))
