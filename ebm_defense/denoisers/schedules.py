"""How much noise a diffusion adds at each level."""

from __future__ import annotations

import math
from collections.abc import Callable

from ebm_defense.errors import UsageError


def linear(levels: int, start: float, end: float) -> list[float]:
    """Return β from start to end in equal steps (Ho, Jain, Abbeel 2020)."""
    return [start + (end - start) * t / max(levels - 1, 1) for t in range(levels)]


def scaled_linear(levels: int, start: float, end: float) -> list[float]:
    """Return β whose roots go in equal steps (Rombach et al. 2022)."""
    return [b**2 for b in linear(levels, math.sqrt(start), math.sqrt(end))]


def cosine(levels: int, start: float, end: float) -> list[float]:
    """Return β of ᾱ = cos²(½π·(t + 0.008)/1.008), at most 0.999 (Nichol, Dhariwal 2021)."""

    def alpha(share: float) -> float:
        return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha((t + 1) / levels) / alpha(t / levels), 0.999) for t in range(levels)]


SCHEDULES: dict[str, Callable[[int, float, float], list[float]]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": cosine,
}
"""By the names that diffusers' schedulers have: (levels, first β, last β) → every β."""


def betas(name: str, levels: int, start: float, end: float) -> list[float]:
    """Return β_0 to β_{levels−1} of a schedule in `SCHEDULES`.

    Raises:
        UsageError: an unknown name, no level, or β outside (0, 1).
    """
    if name not in SCHEDULES:
        raise UsageError(f"the noise schedule is {name!r}; choose one of {', '.join(SCHEDULES)}.")
    if levels < 1 or not 0 < start <= end < 1:
        raise UsageError(
            f"a noise schedule needs 1 level or more and 0 < β_start ≤ β_end < 1, not {levels} "
            f"levels from {start} to {end}."
        )
    return SCHEDULES[name](levels, start, end)
