"""Settings in words, for captions."""

from __future__ import annotations

from typing import Any

from ebm_defense.attacks import PGD, Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.threat import fraction
from ebm_defense.eval.judging.rules import Rule
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.purifiers import registry


def attack_caption(attack: Attack) -> str:
    """Return one sentence that says exactly what an attack does, its name first."""
    return f"{attack.name}: {attack_details(attack)}"


def attack_details(attack: Attack) -> str:
    """Return what an attack of this name does: all its numbers, and a full stop."""
    if isinstance(attack, Transfer):
        return (
            f"its final iterates, {_steps(attack.attack)}, first seen through {attack.replicates} "
            "replicates."
        )
    if isinstance(attack, PGD):
        return (
            f"{_steps(attack)}, {attack.gradient.name} gradient, {attack.replicates} replicates a "
            "step."
        )
    gradient = getattr(attack, "gradient", None)
    through = f"{gradient.name} gradient, " if gradient else ""
    return f"{attack.threat}, {through}{attack.replicates} replicates a look."


def _steps(attack: Attack) -> str:
    if not isinstance(attack, PGD):
        return str(attack.threat)
    start = "random start" if attack.random_start else "no random start"
    size = fraction(attack.step_size)
    return f"{attack.threat}, {attack.steps} steps of {size}, {start}"


def verdict_caption(rule: Rule, most: int) -> str:
    """Return one sentence that says on what draws, and how, images were judged."""
    if isinstance(rule, Sequential):
        return (
            f"Judged by a sequential test of the votes at error level {rule.alpha:g}, on at most "
            f"{most} fresh replicates; undecided images count both ways in the intervals."
        )
    return f"Judged on {most} fresh replicates ({rule.name} rule)."


def defense_caption(settings: dict[str, Any]) -> str:
    """Return what purifies, and in which precision verdicts are passed; old runs do not tell."""
    verdicts = f"; verdicts in {settings['verdicts']}" if "verdicts" in settings else ""
    return f"Purifier: {registry.caption(settings['purifier'])}{verdicts}"
