"""Settings in words, for captions."""

from __future__ import annotations

from typing import Any

from ebm_defense.attacks import PGD, Transfer
from ebm_defense.attacks.base import Attack
from ebm_defense.attacks.threat import fraction
from ebm_defense.eval.judging.rules import AsDeployed, Rule
from ebm_defense.eval.judging.sequential import Sequential
from ebm_defense.eval.protocols.protocol import Protocol
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


def verdict_caption(protocol: Protocol, predicted: int) -> str:
    """Return in sentences on what draws, and how, images were judged.

    Args:
        protocol: what was run.
        predicted: R, the draws that one prediction of the defense averages.
    """
    rule, most = protocol.verdict, protocol.judge_replicates
    judged = f"{_judged(protocol)} {_by(rule, most)}".strip()
    if isinstance(rule, AsDeployed):
        judged += f" {AVERAGED.format(draws=predicted)}" if predicted > 1 else ""
    return judged


AVERAGED = "As deployed, a prediction averages {draws} replicates."


def _judged(protocol: Protocol) -> str:
    """Return which images came before the judge."""
    chosen = protocol.selection
    if chosen is None:
        return ""
    if chosen.candidates == 1:
        return "Of each attack the images that it ends with are judged, once."
    return (
        f"Of each attack's {chosen.candidates} strongest images the one of the lowest mean margin "
        f"on {chosen.draws} draws of its own is judged, once."
    )


def _by(rule: Rule, most: int) -> str:
    if isinstance(rule, Sequential):
        return (
            f"Judged by a sequential test of the votes at error level {rule.alpha:g}, on at most "
            f"{most} fresh replicates; undecided images count both ways in the intervals."
        )
    how = "" if isinstance(rule, AsDeployed) else f" ({rule.name} rule)"
    return f"Judged on {most} fresh replicates{how}."


def defense_caption(settings: dict[str, Any]) -> str:
    """Return what purifies, and in which precision verdicts are passed; old runs do not tell."""
    verdicts = f"; verdicts in {settings['verdicts']}" if "verdicts" in settings else ""
    return f"Purifier: {registry.caption(settings['purifier'])}{verdicts}"
