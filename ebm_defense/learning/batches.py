"""Training batches as a function of (seed, update), so that a run goes on exactly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.data import Images
from ebm_defense.errors import UsageError
from ebm_defense.interface.inputs import read_training_data
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import derive_seed


def generator_of(seed: int, purpose: str) -> torch.Generator:
    """Return a generator for one purpose of a run, independent of every other purpose's."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Shuffled, shifted and mirrored images, every one once an epoch.

    Attributes:
        data: images `[N, C, H, W]` in [0, 1] and labels.
        size: images a batch.
        padding: pixels of a random shift; 0 for none.
        flip: mirror every other image.
        extra: more images, of which each batch holds a share.
        share: that share, in [0, 1).
        seed: seed of every draw.
    """

    data: Images
    size: int = 100
    padding: int = 2
    flip: bool = True
    extra: Images | None = None
    share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        object.__setattr__(self, "data", Images(*read_training_data(*self.data)))
        if self.extra is not None:
            object.__setattr__(self, "extra", Images(*read_training_data(*self.extra)))
        most = len(self.data.labels)
        if not 1 <= self.own <= most:
            raise UsageError(f"a batch must hold from 1 to {most} of the images, not {self.own}.")
        if self.padding < 0 or not 0 <= self.share < 1:
            raise UsageError("padding must be 0 or more and the extra images' share in [0, 1).")

    @property
    def own(self) -> int:
        """How many images of a batch are the data's own."""
        return self.size - (0 if self.extra is None else round(self.size * self.share))

    @property
    def an_epoch(self) -> int:
        """Batches an epoch; what does not fill one is left for another epoch's order."""
        return len(self.data.labels) // self.own

    def at(self, update: int) -> Images:
        """Return the batch of an update, counted from 0."""
        generator = generator_of(self.seed, f"batch {update}")
        rows = self._rows(update)
        images, labels = self.data.images[rows], self.data.labels[rows]
        if self.extra is not None and self.own < self.size:
            more = torch.randint(
                len(self.extra.labels), (self.size - self.own,), generator=generator
            )
            images = torch.cat([images, self.extra.images[more]])
            labels = torch.cat([labels, self.extra.labels[more]])
        return Images(augmented(images, self.padding, self.flip, generator), labels)

    def _rows(self, update: int) -> Tensor:
        epoch, i = divmod(update, self.an_epoch)
        order = _order(len(self.data.labels), derive_seed(self.seed, f"epoch {epoch}"))
        return order[i * self.own : (i + 1) * self.own]


@lru_cache(maxsize=2)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def augmented(x: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Mirror every other image of `[b, C, H, W]` and shift each, as asked."""
    if flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return shifted(x, padding, generator) if padding else x


def shifted(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `padding` pixels each way, filling with the edge of black."""
    b, _, h, w = x.shape
    padded = F.pad(x, (padding,) * 4)
    offsets = torch.randint(2 * padding + 1, (2, b), generator=generator)
    rows = offsets[0, :, None] + torch.arange(h)
    columns = offsets[1, :, None] + torch.arange(w)
    picked = padded[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)
