"""Frozen settings from plain values, such as a TOML file holds."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from ebm_defense.errors import UsageError

T = TypeVar("T")


def from_plain(kind: type[T], plain: dict[str, Any], source: str) -> T:
    """Build a frozen dataclass from plain values, refusing unknown keys by their path.

    Raises:
        UsageError: an unknown key, or a value of another type or out of range.
    """
    from pydantic import TypeAdapter, ValidationError

    _refuse_unknown(kind, plain, source, "")
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ")
        raise UsageError(f"{source}: {path + ': ' if path else ''}{message}") from error


def _refuse_unknown(kind: Any, plain: dict[str, Any], source: str, path: str) -> None:
    fields = {f.name for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key, value in plain.items():
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise UsageError(f"{source}: unknown key {path + key!r}; it may hold {known}.")
        inner = [
            t for t in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(t)
        ]
        if isinstance(value, dict) and inner:
            _refuse_unknown(inner[0], value, source, f"{path}{key}.")
