"""How much of an EOT gradient is signal, against the number of replicates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.gradients.base import Gradient
from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.inputs import read_batch
from ebm_defense.noise import chain_keys


class Signal(NamedTuple):
    """What two independent EOT gradients of `replicates` each say of one another.

    Attributes:
        replicates: of either gradient.
        cosine: mean over images of their cosine; 1 is all signal, 0 all noise.
        low: the tenth percentile of that cosine over images.
        ratio: norm of the mean gradient over that of the noise on it, √(Σ⟨g, h⟩ / Σ½‖g − h‖²) with
            sums over images; 0 where the sum of products is negative.
    """

    replicates: int
    cosine: float
    low: float
    ratio: float


def eot_signal(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    gradient: Gradient,
    loss: Loss,
    replicates: Sequence[int],
    seed: int = 0,
) -> list[Signal]:
    """Compare two independent EOT gradients at `images`, at each number of replicates.

    Args:
        defense: what is differentiated.
        images: `[N, C, H, W]` in [0, 1].
        labels: true classes `[N]`.
        gradient: how the defense is differentiated.
        loss: what is differentiated, on replicate logits.
        replicates: numbers of at least 1; a deterministic defense has nothing to measure.
        seed: of the noise; each number of replicates draws afresh.

    Raises:
        UsageError: a deterministic defense, no images, replicates below 1, or a gradient that this
            defense does not have.
    """
    images, labels = read_batch(images, labels)
    if not len(images) or min(replicates, default=0) < 1:
        raise UsageError(
            "the signal needs images and replicates of at least 1, not "
            f"{len(images)} and {list(replicates)}."
        )
    defense.check_deterministic(images, again=True)
    if not defense.stochastic:
        raise UsageError("this defense is deterministic: its gradient has no noise to measure.")
    gradient.chain_steps(defense)

    def estimate(count: int, half: str) -> Tensor:
        keys = chain_keys(seed, f"signal {count} {half}", range(len(images)), range(count))
        found = gradient(defense, images, labels, keys, loss).gradient
        return found.flatten(1).cpu().double()

    return [
        compare(count, estimate(count, "first"), estimate(count, "second")) for count in replicates
    ]


def compare(replicates: int, first: Tensor, second: Tensor) -> Signal:
    """Return what two gradients `[b, d]` of as many replicates each say of one another."""
    cosine = torch.cosine_similarity(first, second, eps=torch.finfo(first.dtype).tiny)
    product, noise = (first * second).sum(), (first - second).square().sum() / 2.0
    ratio = math.sqrt(max(float(product), 0.0) / float(noise)) if noise else math.inf
    return Signal(replicates, float(cosine.mean()), float(cosine.quantile(0.1)), ratio)
