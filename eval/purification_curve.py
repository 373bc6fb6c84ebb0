"""What a purifier does as its chain grows longer: classes kept, attacks washed out, compression."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.images import check_images, check_labels
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import SteppedPurifier

WORTH = 0.01
"""A longer chain must gain this much accuracy to be worth its steps."""


class Point(NamedTuple):
    """What a chain of so many steps does.

    Attributes:
        steps: K.
        clean: accuracy on images, by the mean logits of the replicates.
        attacked: likewise on attacked ones.
        compression: ‖P(x+δ; ω) − P(x; ω)‖ / ‖δ‖ at the same noise ω, the mean over images and
            replicates; below 1 the chain takes perturbations back, above 1 it spreads them.
        at_random: likewise of perturbations at random; not a number where none were given.
    """

    steps: int
    clean: float
    attacked: float
    compression: float
    at_random: float = math.nan


def purification_curve(
    purifier: SteppedPurifier,
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    attacked: Tensor,
    labels: Tensor,
    *,
    lengths: Sequence[int],
    wandered: Tensor | None = None,
    replicates: int = 4,
    seed: int = 0,
) -> list[Point]:
    """Return what chains of each length do, all prefixes of the same chains.

    Args:
        purifier: made of steps; `lengths` may go beyond its own number of them.
        classify: maps images `[n, C, H, W]` in [0, 1] to logits `[n, classes]`.
        images: `[N, C, H, W]` in [0, 1].
        attacked: the same images as an attack left them.
        labels: true classes `[N]`.
        lengths: numbers of steps K ≥ 0.
        wandered: the same images perturbed at random, if compression is asked of that too.
        replicates: chains an image, at least 1.
        seed: seed of their noise; an image and its attacked version share it.

    Raises:
        UsageError: images, labels or settings that do not fit.
    """
    check_images(images)
    moved = [attacked] if wandered is None else [attacked, wandered]
    for perturbed in moved:
        check_images(perturbed, name="attacked images")
    check_labels(labels, images)
    alike = all(perturbed.shape == images.shape for perturbed in moved)
    if not alike or replicates < 1 or min(lengths, default=-1) < 0:
        raise UsageError(
            "a purification curve needs attacked images like the originals, replicates ≥ 1 and "
            "lengths of 0 steps or more."
        )
    keys = chain_keys(seed, "purification curve", range(len(images)), range(replicates)).flatten()
    starts = torch.stack([images, *moved]).repeat(1, replicates, 1, 1, 1)
    points = []
    for steps, ends in _prefixes(purifier, starts, keys.to(images.device), sorted(set(lengths))):
        clean, wrong = (_accuracy(classify, end, labels, replicates) for end in ends[:2])
        points.append(Point(steps, clean, wrong, *_compressions(starts, ends)))
    return points


def _compressions(starts: Tensor, ends: Tensor) -> list[float]:
    """Return the mean of ‖P(x+δ) − P(x)‖/‖δ‖ for each kind of perturbed images after the first."""
    before, after = (
        _norms((x[1:] - x[0]).flatten(0, 1)).view(len(x) - 1, -1) for x in (starts, ends)
    )
    return [float((b[a > 0] / a[a > 0]).mean()) for a, b in zip(before, after, strict=True)]


@torch.no_grad()
def _prefixes(
    purifier: SteppedPurifier, starts: Tensor, keys: Tensor, lengths: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield the purified images `[kinds, r·N, C, H, W]` at each length."""
    noise, states, done = KeyedNoise(keys), [purifier.enter(x) for x in starts], 0
    for steps in lengths:
        states = [purifier.advance(x, noise, range(done, steps)) for x in states]
        done = steps
        yield steps, torch.stack([purifier.leave(x) for x in states])


@torch.no_grad()
def _accuracy(
    classify: Callable[[Tensor], Tensor], purified: Tensor, labels: Tensor, replicates: int
) -> float:
    logits = torch.stack([classify(part) for part in purified.chunk(replicates)]).mean(0)
    return float((logits.argmax(-1) == labels).float().mean())


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def recommend(points: Sequence[Point]) -> tuple[int, str]:
    """Return the number of steps to purify by, and the reason in a sentence.

    The shortest chain whose accuracy on attacked images is within `WORTH` of the best among those
    that are right at least as often on clean images as the best is on attacked ones.

    Raises:
        UsageError: no points.
    """
    if not points:
        raise UsageError("no length was measured, so none can be recommended.")
    best = max(points, key=lambda p: (p.attacked, -p.steps))
    worthy = [p for p in points if p.attacked >= best.attacked - WORTH and p.clean >= best.attacked]
    chosen = min(worthy or [best], key=lambda p: p.steps)
    reason = (
        f"{chosen.steps} steps leave {chosen.attacked:.1%} of attacked and {chosen.clean:.1%} of "
        "clean images right"
    )
    if chosen.steps == max(p.steps for p in points):
        return chosen.steps, f"{reason}, and longer chains were not tried."
    return chosen.steps, f"{reason}; no longer chain gains {WORTH:.0%}."
