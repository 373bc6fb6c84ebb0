"""A flag, and all that flags are raised upon."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.judging.sanity_checks import SanityChecks
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.storage.columns import Kept, attack_column, column


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One sign.

    Attributes:
        name: its name in `FLAGS`.
        evidence: what was seen, in numbers.
        advice: what to do.
        attacks: numbers of the attacks whose rows it concerns; none where it concerns the model.
    """

    name: str
    evidence: str
    advice: str
    attacks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that flags look at: the records of a run, and a few queries of its model."""

    protocol: Protocol
    records: pd.DataFrame
    sanity_checks: SanityChecks

    def kept(self, number: int, what: Kept) -> pd.Series | None:
        """Return what the records keep of an attack; None where they keep no such thing."""
        return self.records.get(column(attack_column(number, self.protocol.attacks[number]), what))

    def column(self, number: int, what: Kept) -> pd.Series:
        """Return what the records surely keep of an attack."""
        return self.records[column(attack_column(number, self.protocol.attacks[number]), what)]

    def numbers(self, want: Callable[[Attack], bool]) -> list[int]:
        """Return the numbers of the attacks that are wanted."""
        return [i for i, attack in enumerate(self.protocol.attacks) if want(attack)]

    def using(self, gradient: str) -> tuple[int, ...]:
        """Return the numbers of the attacks that use the gradient of this name."""
        return tuple(
            self.numbers(lambda a: getattr(getattr(a, "gradient", None), "name", None) == gradient)
        )


Finding = Iterable[tuple[str, tuple[int, ...]]]
"""Evidence in words, and the attacks that it concerns; nothing where all is well."""
