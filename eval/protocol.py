"""An evaluation as a frozen, printable value; the published ones as presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ebm_defense.attacks import PGD, Attack, ThreatModel, Transfer
from ebm_defense.errors import UsageError
from ebm_defense.fingerprint import fingerprint

PUBLISHED_EPS = 8 / 255
STEPS_ACROSS_EPS = 4  # the published step is 2/255 at eps 8/255


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is run and how it is judged.

    Attributes:
        name: stands in every table.
        attacks: each is judged on its own row.
        judge_replicates: fresh draws H of a verification, and of clean accuracy.
    """

    name: str
    attacks: tuple[Attack, ...]
    judge_replicates: int

    def __post_init__(self) -> None:
        if self.judge_replicates < 1:
            raise UsageError(f"judge replicates must be at least 1, not {self.judge_replicates}.")
        if not self.attacks:
            raise UsageError("a protocol needs at least one attack.")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The numbers of a BPDA+EOT evaluation; None keeps the preset's.

    Attributes:
        norm: "Linf" or "L2".
        eps: in [0, 1] units.
        steps: attack steps.
        step_size: in [0, 1] units; a quarter of eps if not given.
        replicates: attack replicates.
        judge_replicates: verification replicates.
    """

    norm: str | None = None
    eps: float | None = None
    steps: int | None = None
    step_size: float | None = None
    replicates: int | None = None
    judge_replicates: int | None = None


def _bpda(name: str, preset: Budget, budget: Budget, transfer: bool) -> Protocol:
    number = {k: v for k, v in dataclasses.asdict(preset).items() if v is not None}
    number |= {k: v for k, v in dataclasses.asdict(budget).items() if v is not None}
    pgd = PGD(
        threat=ThreatModel(norm=number["norm"], eps=number["eps"]),
        steps=number["steps"],
        step_size=number.get("step_size", number["eps"] / STEPS_ACROSS_EPS),
        replicates=number["replicates"],
    )
    attacks: tuple[Attack, ...] = (pgd,)
    if transfer:
        attacks = (Transfer(attack=pgd, replicates=number["replicates"]), pgd)
    return Protocol(name=name, attacks=attacks, judge_replicates=number["judge_replicates"])


def _hill2021(budget: Budget) -> Protocol:
    """BPDA+EOT as published by Hill, Mitchell, Zhu (2021), and their transfer attack."""
    preset = Budget(norm="Linf", eps=PUBLISHED_EPS, steps=50, replicates=15, judge_replicates=150)
    return _bpda("hill2021", preset, budget, transfer=True)


def _quick(budget: Budget) -> Protocol:
    """The same attack in minutes on a CPU: a first impression, not a result for a paper."""
    preset = Budget(norm="Linf", eps=PUBLISHED_EPS, steps=10, replicates=8, judge_replicates=32)
    return _bpda("quick", preset, budget, transfer=False)


PROTOCOLS: dict[str, Callable[[Budget], Protocol]] = {"quick": _quick, "hill2021": _hill2021}


def get_protocol(name: str, **budget: Any) -> Protocol:
    """Return a preset, with some of its numbers replaced.

    Args:
        name: a name in `PROTOCOLS`.
        **budget: fields of `Budget`: norm, eps, steps, step_size, replicates, judge_replicates.
            A changed number shows in every table's footnote; the name stays.

    Raises:
        UsageError: an unknown name or number, or one out of range.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; choose one of {', '.join(PROTOCOLS)}.")
    known = {f.name for f in dataclasses.fields(Budget)}
    for key in budget:
        if key not in known:
            raise UsageError(
                f"unknown protocol setting {key!r}; it has {', '.join(sorted(known))}."
            )
    return PROTOCOLS[name](Budget(**budget))


def describe(value: Any) -> Any:
    """Turn frozen settings into plain values for TOML, each dataclass under its `kind`."""
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
    parts = {k: describe(v) for k, v in vars(model).items() if dataclasses.is_dataclass(v)}
    plain = {k: v for k, v in vars(model).items() if isinstance(v, int | float | str)}
    unlike = ("training", "seed", "calls", "max_chains")  # what an attack's images do not rest on
    described = {k: v for k, v in (parts | plain).items() if k not in unlike}
    purifier = getattr(model, "purifier", None)
    if isinstance(purifier, nn.Module):
        described["purifier"] = _describe_model(purifier)
    return {"kind": type(model).__name__, "weights": fingerprint(model), **described}
