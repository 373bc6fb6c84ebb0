"""From which length on a purifier's chains take images of one class into another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.statistics import Share, mean_share
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import SteppedPurifier

WORTH = 0.05
"""Classes mix once so large a share of chains has certainly left its class."""


class Mixing(NamedTuple):
    """What chains of so many steps did to the classes that they began in.

    Attributes:
        steps: K.
        moved: the share of an image's chains that are of another class, and its interval over
            images.
        moves: how many chains came from one class to another, by (from, to), the most first.
    """

    steps: int
    moved: Share
    moves: dict[tuple[int, int], int]


@torch.no_grad()
def class_mixing(
    purifier: SteppedPurifier,
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    lengths: Sequence[int],
    replicates: int = 4,
    seed: int = 0,
) -> list[Mixing]:
    """Return what chains of each length do to classes, all prefixes of the same chains.

    A chain's class is what the classifier says of it, and it begins in that of its image before
    any step: what the classifier gets wrong is not counted as mixing.

    Args:
        purifier: made of steps; `lengths` may go beyond its own number of them.
        classify: maps images `[n, C, H, W]` in [0, 1] to logits `[n, classes]`.
        images: `[N, C, H, W]` in [0, 1].
        lengths: numbers of steps, in rising order.
        replicates: chains an image.
        seed: of their noise.

    Raises:
        UsageError: no images, no lengths, or lengths that do not rise.
    """
    if not len(images) or not lengths or list(lengths) != sorted({*lengths}) or lengths[0] < 0:
        raise UsageError("mixing needs images, and numbers of steps in rising order.")
    keys = chain_keys(seed, "mixing", range(len(images)), range(replicates)).flatten()
    noise = KeyedNoise(keys.to(images.device))
    starts = images.repeat(replicates, 1, 1, 1)
    first = classify(starts).argmax(-1)
    ends = purifier.on_the_way(starts, noise, lengths)
    found = []
    for steps in lengths:
        now = classify(ends[steps]).argmax(-1)
        moved = (now != first).view(replicates, -1).double().mean(0)
        pairs = zip(first.tolist(), now.tolist(), strict=True)
        moves = Counter((a, b) for a, b in pairs if a != b)
        found.append(Mixing(steps, mean_share(moved.tolist()), dict(moves.most_common())))
    return found


def starts_to_mix(found: Sequence[Mixing]) -> Mixing | None:
    """Return the first length at which more than `WORTH` of chains have certainly left their
    class; None if there is none.
    """
    return next((m for m in found if m.moved.low > WORTH), None)
