"""Frozen settings back from the plain values that `describe` made of them."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable
from functools import cache
from typing import Any

from ebm_defense.errors import UsageError
from ebm_defense.eval.protocol import Protocol, describe

ROOMS = ("ebm_defense.attacks", "ebm_defense.eval")


def restore_protocol(plain: dict[str, Any], kinds: Iterable[type] = ()) -> Protocol:
    """Return the protocol that `describe` made `plain` of.

    Args:
        plain: from `describe`, or a run's settings.
        kinds: frozen dataclasses of your own that it may hold, such as an attack.

    Raises:
        UsageError: it holds something unknown.
    """
    known = _own_kinds() | {kind.__name__: kind for kind in kinds}
    protocol = _restore(plain, known)
    if not isinstance(protocol, Protocol) or describe(protocol) != plain:
        raise UsageError("these settings hold no protocol of this version; run it again.")
    return protocol


@cache
def _own_kinds() -> dict[str, type]:
    """Return every dataclass that attacks and protocols are made of, by name."""
    modules = [
        importlib.import_module(f"{room}.{found.name}")
        for room in ROOMS
        for found in pkgutil.iter_modules(importlib.import_module(room).__path__)
    ]
    values = [value for module in modules for value in vars(module).values()]
    return {v.__name__: v for v in values if isinstance(v, type) and dataclasses.is_dataclass(v)}


def _restore(value: Any, known: dict[str, type]) -> Any:
    if isinstance(value, list):
        return tuple(_restore(v, known) for v in value)
    if not isinstance(value, dict):
        return value
    fields = {k: _restore(v, known) for k, v in value.items() if k != "kind"}
    kind = value.get("kind", "settings without a kind")
    try:
        return known[kind](**fields)
    except KeyError:
        raise UsageError(
            f"this run holds {kind!r}, which is none of ours; load it in Python with "
            "load_run(folder, kinds=[its class])."
        ) from None
    except (TypeError, UsageError) as error:
        raise UsageError(f"{kind} of another version ({error}); run it again.") from error
