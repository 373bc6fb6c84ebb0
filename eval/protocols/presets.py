"""The attacks that the dearer presets are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    Attack,
    Auto,
    CrossEntropy,
    DiffHammer,
    Full,
    Square,
    TargetedAPGD,
    ThreatModel,
    Transfer,
)
from ebm_defense.attacks.gradients.base import VjpGradient

QUERIES_A_STEP = 50
"""Square gets 5,000 queries where APGD gets the published 100 steps."""
STANDARD = frozenset(
    {"Transfer", "PGD", "DiffHammer", "APGD CrossEntropy", "APGD DLR", "TargetedAPGD", "Square"}
)
"""The kinds of attack in the ensemble `standard`, as `standard_kind` names them."""


def standard_kind(attack: Attack) -> str:
    """Return which kind of attack of `standard` one is; none where it should go through the chain
    and does not.
    """
    kind, gradient = type(attack).__name__, getattr(attack, "gradient", None)
    through = isinstance(gradient, VjpGradient) and gradient.through_chain
    if gradient is not None and kind != "PGD" and not through:
        return ""
    return f"APGD {type(getattr(attack, 'loss', None)).__name__}" if kind == "APGD" else kind


def mefa_attack(threat: ThreatModel, steps: int, step_size: float, replicates: int) -> Attack:
    """Return PGD through every step of the chain, from the image itself."""
    return PGD(
        threat=threat,
        steps=steps,
        step_size=step_size,
        replicates=replicates,
        gradient=Full(),
        random_start=False,
    )


REPLICATES_A_RESTART = 4
"""Where one replicate says all, targeted APGD gets a restart for so many."""


def with_restarts(attack: Attack) -> Attack:
    """Return an attack on a deterministic model: its replicates would all be the same, and what
    they would cost buys targeted APGD restarts, each on the images that still stand.
    """
    if not isinstance(attack, TargetedAPGD):
        return attack
    restarts = max(attack.restarts, attack.replicates // REPLICATES_A_RESTART)
    return dataclasses.replace(attack, restarts=restarts)


def standard_attacks(
    threat: ThreatModel, steps: int, step_size: float, replicates: int
) -> tuple[Attack, ...]:
    """Return the attacks of `standard`, cheapest first.

    Args:
        threat: what may change.
        steps: gradient steps of each; Square gets 50 queries a step.
        step_size: of PGD; the others choose their own.
        replicates: of each, in every step.

    All but PGD differentiate the defense by the gradient that fits it.
    """
    pgd = PGD(threat=threat, steps=steps, step_size=step_size, replicates=replicates)
    common: dict[str, Any] = {"threat": threat, "replicates": replicates}
    through = common | {"steps": steps, "gradient": Auto()}
    return (
        Transfer(attack=pgd, replicates=replicates),
        pgd,
        APGD(**through, loss=CrossEntropy()),
        APGD(**through, loss=DLR()),
        DiffHammer(**through),
        TargetedAPGD(**through),
        Square(**common, steps=QUERIES_A_STEP * steps),
    )
