"""Signs that a number should not be believed, each with its evidence and a sentence of advice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from ebm_defense.eval.reporting.flags import attacks, model
from ebm_defense.eval.reporting.flags.evidence import Evidence, Finding, Flag

LOG = logging.getLogger("ebm_defense.eval")

FLAGS: dict[str, tuple[Callable[[Evidence], Finding], str]] = {
    "randomised output": (
        model.randomised,
        "One pass says little: each column defines accuracy in its own way; state which you use.",
    ),
    "probabilities": (
        model.probabilities,
        "Give the logits before the softmax; a loss on probabilities has vanishing gradients.",
    ),
    "other classes": (
        model.other_classes,
        "Unless the images are of some classes on purpose, labels are numbered otherwise than "
        "outputs: say which output each class is (--class-map, or the model's own numbers).",
    ),
    "no gradient": (
        model.no_gradient,
        "The attack is blind there: replace what is not differentiable in the backward pass, or "
        "trust black-box and transfer attacks only.",
    ),
    "around the chain": (
        model.around,
        "BPDA is not the strongest gradient: attack with the full one, or with the smoothed one "
        "where activations are LeakyReLU or ReLU; protocol standard takes what fits.",
    ),
    "no curvature": (
        model.no_curvature,
        "The exact gradient of a piecewise linear energy is the identity's: use the smoothed one.",
    ),
    "weak signal": (
        model.weak_signal,
        "The attack follows noise: give it more replicates, until the cosine is well above "
        f"{model.LEAST_COSINE}.",
    ),
    "replay mismatch": (
        model.replay,
        "The model draws randomness of its own or answers differently when it is attacked: let it "
        "take its noise from the purifier, and look for what tells the calls apart.",
    ),
    "unbounded attack fails": (
        model.unbounded,
        "Any image can be changed into any other, so the gradient is masked: do not believe the "
        "robust accuracy of these rows.",
    ),
    "black box ahead": (
        attacks.black_ahead,
        "A white-box attack knows more and should break more: its gradient is masked.",
    ),
    "transfer ahead": (
        attacks.transfer_ahead,
        "A white-box attack knows more and should break more: its gradient is masked.",
    ),
    "still falling": (
        attacks.not_flat,
        "The attack was stopped too early: give it more steps, until the curve is flat.",
    ),
    "purifier destroys images": (
        model.destroys,
        "An energy must be low where images are likely, p(x) ∝ exp(−U(x)): try the other sign, "
        "then fewer or smaller steps.",
    ),
    "views differ": (
        attacks.views_differ,
        "The model behaves differently towards attack and judge, as one that detects the number of "
        "replicates would: look for what tells the calls apart.",
    ),
}
"""Each flag by name: how it is found, and what to do about it."""


def raise_flags(evidence: Evidence) -> tuple[Flag, ...]:
    """Return every flag that the evidence raises, in the order of `FLAGS`."""
    return tuple(
        Flag(name=name, evidence=words, advice=advice, attacks=attacks)
        for name, (find, advice) in FLAGS.items()
        for words, attacks in find(evidence)
    )


def log_flags(flags: Iterable[Flag]) -> None:
    """Say of each flag what was seen and what to do."""
    for flag in flags:
        LOG.warning("%s: %s. %s", flag.name, flag.evidence, flag.advice)
