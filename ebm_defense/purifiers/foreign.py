"""Anybody's map of images to images as a purifier."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.noise import GeneratorNoise, KeyedNoise, Noise, fresh_seed
from ebm_defense.purifiers.base import Purifier


class ForeignPurifier(Purifier):
    """Anybody's map of images to images, a diffusion purifier for instance.

    A foreign map draws from torch's global generator; here that generator is forked, seeded from
    the noise stream for the call, and put back as it was. Its noise then depends on the batch too.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.transform = transform

    def prepared(self, images: Tensor) -> Tensor:
        return images  # it knows in which precision it runs

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        # All GPUs' generators: the seed below is set on all of them.
        forked = torch.random.fork_rng(range(torch.cuda.device_count()))
        with forked, torch.no_grad():
            torch.manual_seed(_seed_from(noise, images))
            purified = self.transform(images.clone())
        if getattr(purified, "shape", None) != images.shape:
            raise UsageError(
                f"a purifier must keep the images' shape {tuple(images.shape)}, but this one "
                f"returned {tuple(getattr(purified, 'shape', ())) or type(purified).__name__}."
            )
        # A copy, since its next answer may be written over this one.
        return torch.as_tensor(purified, device=images.device, dtype=images.dtype).clone()


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
