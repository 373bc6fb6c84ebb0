"""The attacks that the dearer presets are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ebm_defense.attacks import (
    APGD,
    DLR,
    PGD,
    Attack,
    CrossEntropy,
    DiffHammer,
    Full,
    Identity,
    Smoothed,
    Square,
    TargetedAPGD,
    ThreatModel,
    Transfer,
)
from ebm_defense.attacks.gradients.base import Gradient
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.sanity_checks import curvature

QUERIES_A_STEP = 50
"""Square gets 5,000 queries where APGD gets the published 100 steps."""
THROUGH = ("Full", "Smoothed")
STANDARD = frozenset(
    {"Transfer", "PGD", "DiffHammer", "APGD CrossEntropy", "APGD DLR", "TargetedAPGD", "Square"}
)
"""The kinds of attack in the ensemble `standard`, as `standard_kind` names them."""


def standard_kind(attack: Attack) -> str:
    """Return which kind of attack of `standard` one is; none where it should go through the chain
    and does not.
    """
    kind, gradient = type(attack).__name__, getattr(attack, "gradient", None)
    if gradient is not None and kind != "PGD" and type(gradient).__name__ not in THROUGH:
        return ""
    return f"APGD {type(getattr(attack, 'loss', None)).__name__}" if kind == "APGD" else kind


def full_gradient() -> Gradient:
    """Return the exact gradient, for a defense that is not known yet."""
    return Full()


def fitting_gradient(defense: PurifiedClassifier, images: Tensor) -> Gradient:
    """Return the gradient that goes through a defense: `Smoothed` on a piecewise linear energy,
    else `Full`, and the identity where no other can be taken.

    Args:
        defense: what is to be attacked.
        images: `[N, C, H, W]` in [0, 1], of which one is queried.
    """
    flat = curvature(defense, images[:1], 0) == 0.0
    try:
        gradient: Gradient = Smoothed() if flat else Full()
        gradient.chain_steps(defense)
    except UsageError:
        return Identity()
    return gradient


def mefa_attack(threat: ThreatModel, steps: int, step_size: float, replicates: int) -> Attack:
    """Return PGD through every step of the chain, from the image itself."""
    return PGD(
        threat=threat,
        steps=steps,
        step_size=step_size,
        replicates=replicates,
        gradient=full_gradient(),
        random_start=False,
    )


def standard_attacks(
    threat: ThreatModel, steps: int, step_size: float, replicates: int, gradient: Gradient
) -> tuple[Attack, ...]:
    """Return the attacks of `standard`, cheapest first.

    Args:
        threat: what may change.
        steps: gradient steps of each; Square gets 50 queries a step.
        step_size: of PGD; the others choose their own.
        replicates: of each, in every step.
        gradient: how all but PGD differentiate the defense.
    """
    pgd = PGD(threat=threat, steps=steps, step_size=step_size, replicates=replicates)
    common: dict[str, Any] = {"threat": threat, "replicates": replicates}
    through = common | {"steps": steps, "gradient": gradient}
    return (
        Transfer(attack=pgd, replicates=replicates),
        pgd,
        APGD(**through, loss=CrossEntropy()),
        APGD(**through, loss=DLR()),
        DiffHammer(**through),
        TargetedAPGD(**through),
        Square(**common, steps=QUERIES_A_STEP * steps),
    )
