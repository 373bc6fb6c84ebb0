"""Settings in words, for captions."""

from __future__ import annotations

from typing import Any

from ebm_defense.attacks import PGD, Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.threat import fraction


def describe_attack(attack: Attack) -> str:
    """Return one sentence that says exactly what an attack does."""
    if isinstance(attack, Transfer):
        return (
            f"{attack.name.capitalize()}: final iterates of {attack.attack.name} on the bare "
            f"classifier, {attack.threat}, first seen through {attack.replicates} replicates."
        )
    if isinstance(attack, PGD):
        start = "random start" if attack.random_start else "no random start"
        return (
            f"{attack.name}: {attack.threat}, {attack.steps} steps of "
            f"{fraction(attack.step_size)}, {start}, {attack.gradient.name} gradient, "
            f"{attack.replicates} replicates a step."
        )
    return f"{attack.name}: {attack.threat}, {attack.replicates} replicates a look."


def describe_purifier(settings: dict[str, Any]) -> str:
    """Return a purifier's name and numbers, as `purifier_settings` gives them."""
    if settings["kind"] == "LangevinPurifier":
        return (
            f"{settings['steps']} Langevin steps of size {settings['step_size']:g} at temperature "
            f"{settings['temperature']:g}, {settings['precision']}"
        )
    numbers = ", ".join(f"{k} {v:g}" for k, v in settings.items() if isinstance(v, float | int))
    return f"{settings['kind']} {numbers}".strip()
