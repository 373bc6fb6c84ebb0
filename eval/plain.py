"""Protocols as TOML files."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib
import typing
from pathlib import Path
from typing import Any

from ebm_defense.errors import UsageError
from ebm_defense.eval.protocol import VERDICTS, Protocol

Path_ = tuple[str | int, ...]


def kinds() -> dict[str, type]:
    """Return every kind that a protocol's file may hold, by name."""
    attacks = importlib.import_module("ebm_defense.attacks")
    parts = [getattr(attacks, name) for name in attacks.__all__]
    found = [Protocol, *VERDICTS.values(), *parts]
    return {k.__name__: k for k in found if isinstance(k, type) and dataclasses.is_dataclass(k)}


def load_protocol(path: str | Path) -> Protocol:
    """Read a protocol from a TOML file, as `Protocol.save` writes it.

    Raises:
        UsageError: no such file, no TOML, an unknown kind or key, by its path, or a value that
            does not fit.
    """
    try:
        plain = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"the protocol file {path} cannot be read ({error}).") from error
    found = _Builder(str(path), kinds()).build({"kind": "Protocol"} | plain, ())
    if not isinstance(found, Protocol):
        raise UsageError(f"{path} holds no protocol; its kind must be Protocol.")
    return found


class _Builder:
    """Builds frozen values from plain ones, and names what does not fit by file and path."""

    def __init__(self, source: str, known: dict[str, type]) -> None:
        self.source, self.known = source, known

    def build(self, plain: Any, path: Path_) -> Any:
        if isinstance(plain, list):
            return tuple(self.build(v, (*path, i)) for i, v in enumerate(plain))
        if not isinstance(plain, dict):
            return plain
        kind = self._kind(plain, path)
        fields = {f.name for f in dataclasses.fields(kind)}
        hints = typing.get_type_hints(kind)
        values = {}
        for key, value in plain.items():
            if key == "kind":
                continue
            if key not in fields:
                self._refuse((*path, key), f"unknown key; it may hold {', '.join(sorted(fields))}")
            values[key] = self._checked(hints[key], self.build(value, (*path, key)), (*path, key))
        try:
            return kind(**values)
        except TypeError as error:
            self._refuse(path, str(error))
        except UsageError as error:
            self._refuse(path, str(error).rstrip("."))

    def _kind(self, plain: dict[str, Any], path: Path_) -> type:
        name = plain.get("kind")
        if name not in self.known:
            self._refuse(path, f"unknown kind {name!r}; choose one of {', '.join(self.known)}")
        return self.known[str(name)]

    def _checked(self, hint: Any, value: Any, path: Path_) -> Any:
        """Check a plain value against its field's type; a whole number may stand for a float."""
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if hint in (bool, int, float, str) and type(value) is not hint:
            self._refuse(path, f"it must be of type {hint.__name__}, not {value!r}")
        nested = dataclasses.is_dataclass(value) or isinstance(value, tuple)
        if hint not in (bool, int, float, str) and not nested and not _allows(hint, value):
            self._refuse(path, f"{value!r} does not fit; give a table with its kind")
        return value

    def _refuse(self, path: Path_, why: str) -> typing.NoReturn:
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        raise UsageError(f"{self.source}: {where + ': ' if where else ''}{why}.")


def _allows(hint: Any, value: Any) -> bool:
    """Whether a union, such as `str | None`, has a member of the value's own type."""
    return type(value) in typing.get_args(hint)
