"""What is drawn in an update: a function of (seed, purpose, update, place in the batch).

So an update is the same whatever ran before it, however its batch is cut, and on as many processes
as hold a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ebm_defense.noise import KeyedNoise, chain_keys, derive_seed


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of some places of an update's batch.

    Attributes:
        seed: of the run.
        update: from 0.
        places: their numbers in the whole batch, each from 0 to `batch` − 1.
        batch: places in the whole batch.
        device: where the numbers are wanted.
    """

    seed: int
    update: int
    places: tuple[int, ...]
    batch: int
    device: torch.device

    def noise(self, purpose: str) -> KeyedNoise:
        """Return the noise of one purpose, a chain a place."""
        updates = range(self.update, self.update + 1)
        return KeyedNoise(chain_keys(self.seed, purpose, self.places, updates)[0].to(self.device))

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """Draw N(0, 1) noise of the shape, dtype and device of `like`, `[b, …]`."""
        return self.noise(purpose).normal(0, like)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        """Draw numbers in [0, 1) of the shape, dtype and device of `like`, `[b, …]`."""
        return self.noise(purpose).uniform(0, like)

    def integers(self, purpose: str, below: Tensor | int) -> Tensor:
        """Draw a number from 0 to below − 1 for each place, int64 `[b]` on the CPU."""
        updates = range(self.update, self.update + 1)
        keys = chain_keys(self.seed, purpose, self.places, updates)[0]
        return (KeyedNoise(keys).bits(0, 1)[:, 0] & (2**62 - 1)) % below

    def at(self, rows: Sequence[int]) -> Draws:
        """Return the draws of some of these places."""
        return replace(self, places=tuple(self.places[i] for i in rows))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some places of an update's batch, with a training image for each.

    Attributes:
        images: `[b, C, H, W]` in [-1, 1], as they are in the data, on the network's device.
        draws: the places' random numbers.
    """

    images: Tensor
    draws: Draws

    def __len__(self) -> int:
        return len(self.images)

    def at(self, rows: Sequence[int]) -> Batch:
        """Return the batch of some of these places."""
        return Batch(images=self.images[list(rows)], draws=self.draws.at(rows))

    def parts(self, count: int) -> Iterator[Batch]:
        """Yield the batch in at most `count` parts of about one size."""
        for rows in torch.arange(len(self)).chunk(count):
            yield self.at(rows.tolist())

    def noisy(self, spread: float) -> Tensor:
        """Return the images with N(0, spread²) noise, in [-1, 1] units."""
        return self.images + spread * self.draws.normal("data noise", self.images)


def batch_of(images: Tensor, draws: Draws) -> Batch:
    """Return the training images of these places: every image once an epoch, in shuffled order.

    Args:
        images: the training images `[N, C, H, W]` in [-1, 1].
        draws: the places.
    """
    rows = [_row(draws.update * draws.batch + i, len(images), draws.seed) for i in draws.places]
    return Batch(images=images[rows].to(draws.device), draws=draws)


def _row(position: int, count: int, seed: int) -> int:
    epoch, i = divmod(position, count)
    return int(_order(count, derive_seed(seed, f"images of epoch {epoch}"))[i])


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
