"""The strongest few of the images that an attack proposes, image by image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.losses import Margin
from ebm_defense.defense import PurifiedClassifier


def mean_margins(defense: PurifiedClassifier, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the margins `[b]` of averaged replicates `[r, b, classes]`; negative where wrong."""
    return -Margin().of(defense.combine(logits), labels)


class Candidates(NamedTuple):
    """What may be chosen from: `k` places for each of `n` images.

    Attributes:
        images: `[k, n, C, H, W]`.
        margins: by the attack's own draws, `[k, n]`.
        steps: the attack's step that each comes from, `[k, n]`.
        filled: whether a place holds an image that no place before it holds, bool `[k, n]`.
    """

    images: Tensor
    margins: Tensor
    steps: Tensor
    filled: Tensor


class Shortlist:
    """The images of the lowest margins by the attack's own draws, and the last one proposed.

    Of an image that is proposed again the lower margin is kept. The margins are those of the
    luckiest of many noisy looks, so they say what to look at again and nothing more.

    Args:
        originals: `[n, C, H, W]`, whose places they are.
        size: how many are kept of each, at least 1; of one, the last.
    """

    def __init__(self, originals: Tensor, size: int) -> None:
        count = len(originals)
        self._best = originals.new_empty((size - 1, *originals.shape))
        self._margins = torch.full((size - 1, count), torch.inf, dtype=torch.float32)
        self._steps = torch.zeros((size - 1, count), dtype=torch.int64)
        self._last, self._last_margins = originals.clone(), self._margins.new_zeros(count)
        self._last_steps = torch.zeros(count, dtype=torch.int64)
        self._offered = torch.zeros(count, dtype=torch.bool)

    def offer(self, rows: Tensor, images: Tensor, margins: Tensor, step: int) -> None:
        """Keep images `[b, C, H, W]` of these `rows` where their `margins` `[b]` are low."""
        own = margins.cpu().float()
        self._last[rows], self._last_margins[rows], self._last_steps[rows] = images, own, step
        self._offered[rows] = True
        if len(self._margins):
            self._enter(rows, images, own, step)

    def _enter(self, rows: Tensor, images: Tensor, margins: Tensor, step: int) -> None:
        kept = self._margins[:, rows]
        again = alike(self._best[:, rows], images[None]) & kept.isfinite()
        place = torch.where(again.any(0), again.int().argmax(0), kept.argmax(0))
        better = margins < kept.gather(0, place[None])[0]
        at, which = place[better], rows[better]
        self._best[at, which] = images[better]
        self._margins[at, which] = margins[better]
        self._steps[at, which] = step

    def candidates(self) -> Candidates:
        """Return what is kept, each image once, the last one proposed first."""
        images = torch.cat([self._last[None], self._best])
        filled = torch.cat([self._offered[None], self._margins.isfinite()])
        for place in range(1, len(images)):
            twice = alike(images[:place], images[place][None]) & filled[:place]
            filled[place] &= ~twice.any(0)
        margins = torch.cat([self._last_margins[None], self._margins])
        steps = torch.cat([self._last_steps[None], self._steps])
        return Candidates(images, margins, steps, filled)


def alike(some: Tensor, others: Tensor) -> Tensor:
    """Return which images `[k, b, C, H, W]` are the same to the last bit, bool `[k, b]`."""
    return (some == others).flatten(2).all(2).cpu()


def strongest(candidates: Candidates, margins: Tensor) -> Tensor:
    """Return the place `[n]` of each image's candidate of the lowest `margins` `[k, n]`."""
    return margins.masked_fill(~candidates.filled, torch.inf).argmin(0)
