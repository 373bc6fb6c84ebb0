"""Anybody's map of images to images as a purifier."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.images import PURIFIED, check_images
from ebm_defense.noise import GeneratorNoise, KeyedNoise, Noise, fresh_seed
from ebm_defense.purifiers.base import Purifier

LOW, NEAR = -0.5, 0.3
"""Images in [-1, 1] have pixels so low, and lie so near to 2x − 1."""


class ForeignPurifier(Purifier):
    """Anybody's map of images to images, a diffusion purifier for instance.

    A foreign map draws from the global generators of torch, NumPy or Python; here they are seeded
    from the noise stream for the call, and put back as they were. Its noise then depends on the
    batch too.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def prepared(self, images: Tensor) -> Tensor:
        return images  # it knows in which precision it runs

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        with _seeded(_seed_from(noise, images)), torch.no_grad():
            purified = self.transform(images.clone())
        if getattr(purified, "shape", None) != images.shape:
            raise UsageError(
                f"a purifier must keep the images' shape {tuple(images.shape)}, but this one "
                f"returned {tuple(getattr(purified, 'shape', ())) or type(purified).__name__}."
            )
        purified = torch.as_tensor(purified, device=images.device)
        if not purified.is_floating_point():
            raise UsageError(
                f"a purifier must return float images about in [0, 1], not {purified.dtype}."
            )
        # A copy, since its next answer may be written over this one.
        kept = purified.to(images.dtype, copy=True)
        _refuse_scale(images, kept)
        return kept


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all global generators for a block, and put them back as they were."""
    kept, kept_python = np.random.get_state(), random.getstate()
    # All GPUs' generators: the seed below is set on all of them.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(kept)
            random.setstate(kept_python)


def _refuse_scale(images: Tensor, purified: Tensor) -> None:
    """Refuse purified images on another scale than [0, 1], which a classifier would not know.

    Raises:
        UsageError: they go far beyond, or are about 2x − 1 of the images x.
    """
    check_images(purified, slack=PURIFIED, name="purified images")
    if not purified.numel() or float(purified.min()) > LOW:
        return
    x, y = images.double(), purified.double()
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var().clamp_min(1e-12))
    start = float(y.mean() - slope * x.mean())
    if abs(slope - 2.0) < NEAR and abs(start + 1.0) < NEAR:
        raise UsageError(
            "the purifier returns images in [-1, 1], about 2x - 1 of those it is given; return "
            "(y + 1) / 2, in [0, 1]."
        )


def _seed_from(noise: Noise, images: Tensor) -> int:
    if isinstance(noise, KeyedNoise):
        mixed = int(noise.bits(0, 1).sum()) if len(noise.keys) else 0
        return mixed & (2**63 - 1)
    if isinstance(noise, GeneratorNoise):
        return int(torch.randint(2**62, (1,), generator=noise.generator))
    return fresh_seed()


def as_purifier(purifier: Callable[[Tensor], Tensor]) -> Purifier:
    """Return the purifier itself if it is ours, else wrap it as a `ForeignPurifier`."""
    return purifier if isinstance(purifier, Purifier) else ForeignPurifier(purifier)
