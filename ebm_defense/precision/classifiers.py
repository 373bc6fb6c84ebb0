"""Whether a classifier names in bf16 the class that it names in fp32: shown once, then looked up.

It concerns verdicts alone, which are argmaxes of averages: gradients and scores that an attack sees
are never rounded. What is shown is a margin, as for chains (see `precision`), of the share of
purified images on which the two classes differ, which bounds how far any accuracy can move.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebm_defense.engine.derivatives import arithmetic
from ebm_defense.interface.outputs import logits_of
from ebm_defense.precision.chains import share_margin
from ebm_defense.precision.findings import key_of, located, say_used
from ebm_defense.precision.names import resolve_precision

VERDICT_PRECISIONS = ("auto", "fp32", "bf16")
PAIRS = 400
"""Purified images that a check compares: a share of differences of 1% is beyond its margin."""
MARGIN = 0.01
SMALL = 100_000
"""Classifiers of fewer parameters cost nothing beside a chain and stay in fp32, unchecked."""

_log = logging.getLogger("ebm_defense")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a check showed.

    Attributes:
        equivalent: whether the margin shown is within `MARGIN`.
        images: how many purified images were compared.
        differ: the margin shown of the share of them that bf16 names another class; 1 where the
            classifier cannot run in bf16.
    """

    equivalent: bool
    images: int
    differ: float


def allowed_verdicts(classifier: nn.Module, device: torch.device) -> str:
    """Return "bf16" where it is fast and a finding shows that it names the classes that fp32 does,
    else "fp32"; see `precision.chains.allowed_precision`.

    Args:
        classifier: maps `[N, C, H, W]` in [0, 1] to logits `[N, classes]`.
        device: where it runs.
    """
    fastest = resolve_precision("fastest", device, torch.float32)
    if fastest != "bf16" or sum(p.numel() for p in classifier.parameters()) < SMALL:
        return "fp32"
    found, where = next(located(agreement_key(classifier, device), Agreement), (None, ""))
    if found is None or not found.equivalent:
        return "fp32"
    say_used("verdicts are passed in bf16", where)
    return "bf16"


def agreement_key(classifier: nn.Module, device: torch.device) -> str:
    """Return the key of a classifier's finding."""
    return key_of(classifier, device, of="verdicts")


@torch.no_grad()
def compare(classifier: nn.Module, images: Tensor) -> Agreement:
    """Compare the classes that a classifier names in bf16 and in fp32.

    Args:
        classifier: any module; one that fails in bf16 is not equivalent.
        images: purified images `[n, C, H, W]` in [0, 1].
    """
    exact = _classes(classifier, images)
    try:
        with arithmetic("bf16", images.device):
            rough = _classes(classifier, images)
    except Exception as error:  # a classifier is anybody's code and may raise anything
        reason = str(error).partition("\n")[0]
        _log.warning("the classifier fails in bf16 (%s: %s).", type(error).__name__, reason)
        return Agreement(equivalent=False, images=len(images), differ=1.0)
    differ = share_margin((exact != rough).double())
    return Agreement(equivalent=differ <= MARGIN, images=len(images), differ=differ)


def _classes(classifier: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([logits_of(classifier(x), x).argmax(-1) for x in images.split(PAIRS)])
