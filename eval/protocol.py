"""An evaluation as a frozen, printable value; the published ones as presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ebm_defense.attacks import PGD, Attack, ThreatModel, Transfer
from ebm_defense.errors import UsageError
from ebm_defense.eval.rules import OneStage, Rule, TwoStage
from ebm_defense.eval.sequential import Sequential

PUBLISHED_EPS = 8 / 255
STEPS_ACROSS_EPS = 4  # the published step is 2/255 at eps 8/255


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is run and how it is judged.

    Attributes:
        name: stands in every table.
        attacks: each is judged on its own row.
        judge_replicates: fresh draws H of a verification, at most, and of clean accuracy.
        verdict: the rule by which draws become a verdict.
    """

    name: str
    attacks: tuple[Attack, ...]
    judge_replicates: int
    verdict: Rule = field(default_factory=TwoStage)

    def __post_init__(self) -> None:
        if self.judge_replicates < 1:
            raise UsageError(f"judge replicates must be at least 1, not {self.judge_replicates}.")
        if not self.attacks:
            raise UsageError("a protocol needs at least one attack.")


VERDICTS: dict[str, Callable[..., Rule]] = {
    "two-stage": TwoStage,
    "one-stage": OneStage,
    "sequential": Sequential,
}


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


KINDS: dict[str, type] = {"bpda": PGD, "transfer": Transfer}
PROTOCOLS: dict[str, Callable[[Budget], Protocol]] = {"quick": _quick, "hill2021": _hill2021}


def get_protocol(name: str, only: Sequence[str] | None = None, **budget: Any) -> Protocol:
    """Return a preset, with some of its numbers replaced.

    Args:
        name: a name in `PROTOCOLS`.
        **budget: fields of `Budget`: norm, eps, steps, step_size, replicates, judge_replicates.
            A changed number shows in every table's footnote; the name stays.
        only: run only these attacks, by their names in `KINDS`; all of the preset if not given.

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
    protocol = PROTOCOLS[name](Budget(**budget))
    return protocol if only is None else _select(protocol, only)


def _select(protocol: Protocol, only: Sequence[str]) -> Protocol:
    for kind in only:
        if kind not in KINDS:
            raise UsageError(f"unknown attack {kind!r}; choose one of {', '.join(KINDS)}.")
    wanted = tuple(KINDS[kind] for kind in only)
    attacks = tuple(a for a in protocol.attacks if isinstance(a, wanted))
    if not attacks:
        raise UsageError(f"protocol {protocol.name} has no attack {' or '.join(only)}.")
    return dataclasses.replace(protocol, attacks=attacks)


def describe(value: Any) -> Any:
    """Turn frozen settings into plain values for TOML, each dataclass under its `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kept = {k: v for k, v in fields.items() if v is not None}
        return {"kind": type(value).__name__, **kept}
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    return value
