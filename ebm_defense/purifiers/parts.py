"""Every network that purifiers in folders are made of, by name."""

from __future__ import annotations

from typing import Any

from ebm_defense.denoisers.registry import DENOISERS
from ebm_defense.energies.registry import ENERGIES, Network
from ebm_defense.generators.registry import GENERATORS

PARTS: dict[str, Network] = ENERGIES | GENERATORS | DENOISERS
"""By the names of their classes; the first is what a folder that names none holds."""

USUAL = next(iter(PARTS))


def part_name(network: Any) -> str | None:
    """Return a network's name in `PARTS`; None for one that has none."""
    return next((name for name, n in PARTS.items() if n.make is type(network)), None)
