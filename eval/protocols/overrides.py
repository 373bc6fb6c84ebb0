"""A protocol's numbers with other attacks, gradients or losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ebm_defense.attacks import spec
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.catalogue import FACTORS, make_attack, takes
from ebm_defense.errors import UsageError
from ebm_defense.eval.protocols.protocol import Protocol

BUDGET = ("threat", "steps", "step_size", "replicates")
"""What attacks by name take over from the protocol's own."""


def override(protocol: Protocol, names: Sequence[str], **asked: Any) -> Protocol:
    """Return a protocol with attacks by name, or its own ones, changed as asked.

    Attacks by name spend what the protocol's own would, as far as they take it. A changed
    protocol's name ends in "-custom".

    Args:
        protocol: the protocol.
        names: attacks as `make_attack` takes them; the protocol's own if there are none.
        **asked: settings that were asked for: names of a gradient or a loss, and budget numbers
            that `protocol` holds already; each must be taken by one of the attacks at least.

    Raises:
        UsageError: what `make_attack` raises, or a setting that no attack takes.
    """
    asked = {k: v for k, v in asked.items() if v is not None}
    factors = {k: v for k, v in asked.items() if k in FACTORS}
    if not names and not factors:
        return protocol
    if names:
        _refuse_untaken(asked, {name: takes(name) for name in names})
        attacks = tuple(_make(name, _budget(protocol) | factors) for name in names)
    else:
        _refuse_untaken(factors, {a.name: _fields(a) for a in protocol.attacks})
        attacks = tuple(_replaced(attack, factors) for attack in protocol.attacks)
    return dataclasses.replace(protocol, name=f"{protocol.name}-custom", attacks=attacks)


def _make(name: str, settings: Mapping[str, Any]) -> Attack:
    taken = takes(name)
    return make_attack(name, **{k: v for k, v in settings.items() if k in taken})


def _replaced(attack: Attack, factors: Mapping[str, str]) -> Attack:
    made = {k: spec.make(FACTORS[k], v, k) for k, v in factors.items() if k in _fields(attack)}
    return dataclasses.replace(attack, **made)  # type: ignore[type-var]


def _fields(attack: Attack) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(attack))  # type: ignore[arg-type]


def _budget(protocol: Protocol) -> dict[str, Any]:
    """Return the numbers of the protocol's attacks; where they differ, the last one's."""
    numbers: dict[str, Any] = {}
    for attack in protocol.attacks:
        numbers |= {name: getattr(attack, name) for name in BUDGET if hasattr(attack, name)}
    return numbers


def _refuse_untaken(asked: Mapping[str, Any], taken: Mapping[str, frozenset[str]]) -> None:
    for name in asked:
        if not any(name in settings for settings in taken.values()):
            raise UsageError(
                f"no attack here takes a {name.replace('_', ' ')} ({', '.join(taken)}); "
                "a library's attack takes its own numbers in brackets, NAME(steps=10)."
            )
