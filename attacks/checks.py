"""Numbers of an attack, refused where they are out of range."""

from __future__ import annotations

import math

from ebm_defense.errors import UsageError


def check_budget(steps: int, replicates: int, restarts: int = 1) -> None:
    """Refuse an attack of no replicates or of fewer than no steps."""
    if steps < 0 or replicates < 1 or restarts < 1:
        raise UsageError(
            "an attack needs steps ≥ 0, replicates ≥ 1 and restarts ≥ 1, not "
            f"{steps}, {replicates} and {restarts}."
        )


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not above 0."""
    if not 0 < value < math.inf:
        raise UsageError(f"an attack's {name} must be above 0, not {value}.")


def check_replicates(replicates: int) -> None:
    """Refuse fewer than one replicate."""
    if replicates < 1:
        raise UsageError(f"replicates must be at least 1, not {replicates}.")
