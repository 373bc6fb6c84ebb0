"""Frozen settings as plain values, such as TOML and JSON hold, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.fingerprint import fingerprint

Path_ = tuple[str | int, ...]
BESIDES = ("training", "seed", "calls", "max_chains", "verdict_precision")
"""Numbers of a model on which an attack's images do not rest."""


def describe(value: Any) -> Any:
    """Turn frozen settings into plain values, each dataclass under its `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kept = {k: v for k, v in fields.items() if v is not None}
        return {"kind": type(value).__name__, **kept}
    if isinstance(value, nn.Module):
        return _describe_model(value)
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    return value


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe a model that an attack carries: its weights by their hash, and its numbers."""
    if isinstance(model, KeptModel):
        return model.plain
    parts = {k: describe(v) for k, v in vars(model).items() if dataclasses.is_dataclass(v)}
    plain = {k: v for k, v in vars(model).items() if isinstance(v, int | float | str)}
    described = {k: v for k, v in (parts | plain).items() if k not in BESIDES}
    purifier = getattr(model, "purifier", None)
    if isinstance(purifier, nn.Module):
        described["purifier"] = _describe_model(purifier)
    return {"kind": type(model).__name__, "weights": fingerprint(model), **described}


class KeptModel(nn.Module):
    """Stands for a model that an attack once carried, of which a description alone was kept."""

    def __init__(self, plain: dict[str, Any]) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """Refuse.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"the run kept no {self.plain['kind']}, only its hashes; make the attack again."
        )


def build(plain: Any, known: Mapping[str, type], source: str, *, models: bool = False) -> Any:
    """Build frozen settings from what `describe` made of them.

    Args:
        plain: plain values.
        known: the dataclasses that they may hold, by name.
        source: where they come from, for messages.
        models: whether they may hold descriptions of models, for which `KeptModel`s then stand.

    Raises:
        UsageError: an unknown kind or key, by its path, or a value that does not fit.
    """
    return _Builder(source, known, models).build(plain, ())


class _Builder:
    """Builds frozen values from plain ones, and names what does not fit by file and path."""

    def __init__(self, source: str, known: Mapping[str, type], models: bool) -> None:
        self.source, self.known, self.models = source, known, models

    def build(self, plain: Any, path: Path_) -> Any:
        if isinstance(plain, list):
            return tuple(self.build(v, (*path, i)) for i, v in enumerate(plain))
        if not isinstance(plain, dict):
            return plain
        if self.models and plain.get("kind") not in self.known and "weights" in plain:
            return KeptModel(plain)
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
        nested = dataclasses.is_dataclass(value) or isinstance(value, tuple | KeptModel)
        if hint not in (bool, int, float, str) and not nested and not _allows(hint, value):
            self._refuse(path, f"{value!r} does not fit; give a table with its kind")
        return value

    def _refuse(self, path: Path_, why: str) -> typing.NoReturn:
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        raise UsageError(f"{self.source}: {where + ': ' if where else ''}{why}.")


def _allows(hint: Any, value: Any) -> bool:
    """Whether a union, such as `str | None`, has a member of the value's own type."""
    return type(value) in typing.get_args(hint)
