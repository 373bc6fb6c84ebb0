"""Frozen settings as plain values, such as TOML and JSON hold, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real
from ebm_defense.storage.fingerprint import fingerprint

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Where in plain values something stands: keys, and numbers in lists."""

SCALARS = (bool, int, float, str)
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


def from_plain(kind: type[T], plain: Mapping[str, Any], source: str, place: Place = ()) -> T:
    """Build a frozen dataclass, and those in it, from plain values.

    Args:
        kind: the dataclass; a table within it is of the kind that its field is declared as, of
            several the one that knows most of its keys.
        plain: plain values.
        source: where they come from, for messages.
        place: where in it they stand.

    Raises:
        UsageError: an unknown key, or a value of another type or out of range, by its path.
    """
    found: T = _Builder(source, {}, models=False).make(kind, plain, place)
    return found


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
    return _Builder(source, known, models=models).build(plain, Any, ())


class _Builder:
    """Builds frozen values from plain ones, and names what does not fit by file and path."""

    def __init__(self, source: str, known: Mapping[str, type], *, models: bool) -> None:
        self.source, self.known, self.models = source, known, models

    def build(self, plain: Any, hint: Any, place: Place) -> Any:
        """Build what a field of this declared type holds."""
        if isinstance(plain, dict):
            return self._table(plain, hint, place)
        if isinstance(plain, list):
            item = (*_members(hint), Any)[0]
            return tuple(self.build(v, item, (*place, i)) for i, v in enumerate(plain))
        return self._value(plain, hint, place)

    def make(self, kind: type, plain: Mapping[str, Any], place: Place) -> Any:
        """Make a dataclass of this kind."""
        fields = {f.name: f for f in dataclasses.fields(kind)}
        hints, values = typing.get_type_hints(kind), {}
        for key, value in plain.items():
            if key not in fields:
                known = ", ".join(sorted(name for name, f in fields.items() if f.init))
                self._refuse((*place, key), f"unknown key; it may hold {known}")
            built = self.build(value, hints[key], (*place, key))
            if fields[key].init:
                values[key] = built
            elif built != fields[key].default:
                self._refuse((*place, key), f"it is {fields[key].default!r} and cannot be set")
        try:
            return kind(**values)
        except TypeError as error:
            self._refuse(place, str(error))
        except UsageError as error:
            self._refuse(place, str(error).rstrip("."))

    def _table(self, plain: dict[str, Any], hint: Any, place: Place) -> Any:
        kinds = [t for t in _alternatives(hint) if dataclasses.is_dataclass(t)]
        if "kind" not in plain and kinds:
            knows = [len({f.name for f in dataclasses.fields(k)} & {*plain}) for k in kinds]
            return self.make(kinds[knows.index(max(knows))], plain, place)  # type: ignore[arg-type]
        name = plain.get("kind")
        if self.models and name not in self.known and "weights" in plain:
            return KeptModel(plain)
        if name not in self.known:
            self._refuse(place, f"unknown kind {name!r}; choose one of {', '.join(self.known)}")
        return self.make(
            self.known[str(name)], {k: v for k, v in plain.items() if k != "kind"}, place
        )

    def _value(self, value: Any, hint: Any, place: Place) -> Any:
        """Check a plain value against a declared type; a whole number may stand for a float."""
        if hint is Any or type(value) in _alternatives(hint):
            return value
        if hint is float and type(value) is int:
            return float(value)
        if isinstance(value, str) and "/" in value and float in _alternatives(hint):
            return real(value, f"{self.source}: {place[-1]}")  # a fraction, as 8/255
        if hint in SCALARS:
            self._refuse(place, f"it must be of type {hint.__name__}, not {value!r}")
        if any(dataclasses.is_dataclass(t) for t in _alternatives(hint)):
            self._refuse(place, f"it must be a table, not {value!r}")
        from pydantic import TypeAdapter, ValidationError
        from pydantic.errors import PydanticUserError

        try:
            return TypeAdapter(hint).validate_python(value)
        except PydanticUserError:
            self._refuse(place, f"{value!r} does not fit; give a table with its kind")
        except ValidationError as error:
            self._refuse(place, f"{value!r} does not fit: {error.errors()[0]['msg']}")

    def _refuse(self, place: Place, why: str) -> typing.NoReturn:
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in place).lstrip(".")
        raise UsageError(f"{self.source}: {where + ': ' if where else ''}{why}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Return what a declared type may be: the members of a union, or itself."""
    members = typing.get_args(hint) if not isinstance(hint, type) else ()
    return members if typing.get_origin(hint) is not tuple and members else (hint,)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the declared type of a tuple's or list's items, or nothing."""
    sequences = [t for t in _alternatives(hint) if typing.get_origin(t) in (tuple, list)]
    return typing.get_args(sequences[0]) if sequences else ()
