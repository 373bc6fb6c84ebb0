"""More training images: what mid-run chains make of those there are, labelled by a robust teacher.

Generated data are the lever that helps adversarial training most (Rebuffi et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebm_defense.data import Images
from ebm_defense.errors import UsageError
from ebm_defense.learning.batches import generator_of
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers import Purifier

BATCH = 400


@torch.no_grad()
def synthesise(
    data: Images,
    purifier: Purifier,
    teacher: Callable[[Tensor], Tensor],
    *,
    count: int,
    agreement: float,
    seed: int = 0,
) -> Images:
    """Run chains from training images and keep those of which a teacher is sure.

    Args:
        data: where the chains start.
        purifier: their energy, steps and noise.
        teacher: images `[b, C, H, W]` in [0, 1] to logits; its class is the label.
        count: chains.
        agreement: the teacher's least probability of that class, in [0, 1].
        seed: seed of the starts and of the chains.

    Returns:
        At most `count` images in [0, 1], and their labels.

    Raises:
        UsageError: a number out of range, or no image of which the teacher is sure.
    """
    if count < 1 or not 0 <= agreement <= 1:
        raise UsageError(f"count must be at least 1 and agreement in [0, 1], not {agreement}.")
    rows = torch.randint(len(data.labels), (count,), generator=generator_of(seed, "starts"))
    keys = chain_keys(seed, "synthesis", range(count), range(1))[0]
    parts = [
        _sure(data.images[some], purifier, teacher, keys[part], agreement)
        for part in torch.arange(count).split(BATCH)
        for some in [rows[part]]
    ]
    made = Images(*(torch.cat(each) for each in zip(*parts, strict=True)))
    if not len(made.labels):
        raise UsageError(f"the teacher is sure of none of {count} images; lower the agreement.")
    return made


def _sure(
    images: Tensor,
    purifier: Purifier,
    teacher: Callable[[Tensor], Tensor],
    keys: Tensor,
    agreement: float,
) -> Images:
    made = purifier(images, noise=KeyedNoise(keys)).clamp(0.0, 1.0)
    probability, label = teacher(made).softmax(-1).max(-1)
    kept = probability >= agreement
    return Images(made[kept], label[kept])
