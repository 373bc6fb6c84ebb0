"""Grids of settings from `--sweep name=value,value`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real, whole

READ = {int: whole, float: real}


def grid(sweeps: Sequence[str], command: type[Any]) -> dict[str, dict[str, Any]]:
    """Return the points of a grid, by a name that says where they lie.

    Args:
        sweeps: "eps=0.02,0.1", the name of a numeric option and its values.
        command: whose options they are.

    Raises:
        UsageError: another form, an unknown or not numeric option, one swept twice, a value twice.
    """
    numeric = _numeric_options(command)
    axes = dict(_axis(sweep, numeric) for sweep in sweeps)
    if len(axes) < len(sweeps):
        raise UsageError("one option is swept twice; give all its values in one --sweep.")
    return {
        ", ".join(f"{name.replace('_', '-')}={value:g}" for name, value in point): dict(point)
        for values in itertools.product(*axes.values())
        for point in [list(zip(axes, values, strict=True))]
    }


def _numeric_options(command: type[Any]) -> dict[str, type]:
    hints = get_type_hints(command)
    kinds = {name: {hint, *get_args(hint)} & set(READ) for name, hint in hints.items()}
    return {name: kind.pop() for name, kind in kinds.items() if kind}


def _axis(sweep: str, numeric: dict[str, type]) -> tuple[str, list[Any]]:
    option, equals, text = sweep.partition("=")
    name = option.strip().lstrip("-").replace("-", "_")
    if not equals or name not in numeric:
        known = ", ".join(option.replace("_", "-") for option in numeric)
        raise UsageError(f"{sweep!r} must be OPTION=VALUE,VALUE, OPTION being one of {known}.")
    try:
        values = [READ[numeric[name]](value, name) for value in text.split(",")]
    except UsageError as error:
        kind = "whole numbers" if numeric[name] is int else "numbers"
        raise UsageError(f"{sweep!r} needs {kind}, separated by commas.") from error
    if len(set(values)) < len(values):
        raise UsageError(f"{sweep!r} names a value twice.")
    return name, values
