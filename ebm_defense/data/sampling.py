"""Splits and samples that keep the classes in their shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import whole

SPLITS = ("train", "val", "test")
SPLIT_SEED = 20_210_501
VALIDATION_SHARE = 1 / 12


class Images(NamedTuple):
    """Images `[N, C, H, W]` in [0, 1] and their labels `[N]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that has been opened; images are read only when they are asked for.

    Attributes:
        labels: the classes of all of its images, int64 `[N]`.
        read: rows `[n]` → the images of those of them that can be read, in their order.
        classes: the names of the classes, in label order; empty where nobody knows.
    """

    labels: Tensor
    read: Callable[[Tensor], Images]
    classes: tuple[str, ...] = ()

    def take(self, limit: int | None = None, seed: int = 0) -> Images:
        """Read all images, or a stratified sample of `limit` of them.

        Raises:
            UsageError: a limit below 1 or beyond what can be read.
        """
        if limit is None:
            return self.read(torch.arange(len(self.labels)))
        limit = whole(limit, "the number of images")
        if limit < 1:
            raise UsageError(f"the number of images must be at least 1, not {limit}.")
        if limit > len(self.labels):
            raise UsageError(f"{limit} images asked for, but there are only {len(self.labels)}.")
        return self._first(stratified_order(self.labels, whole(seed, "the seed")), limit)

    def _first(self, order: Tensor, limit: int) -> Images:
        """Read the first `limit` rows of an order that can be read."""
        parts, found = [], 0
        while found < limit:
            if not len(order):
                raise UsageError(f"{limit} images asked for, but only {found} can be read.")
            part = self.read(order[: limit - found])
            order, found = order[limit - found :], found + len(part.labels)
            parts += [part] if len(part.labels) else []
        return Images(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def part(self, rows: Tensor) -> Source:
        """Return a source of these rows alone."""
        return Source(
            labels=self.labels[rows],
            read=lambda chosen: self.read(rows[chosen]),
            classes=self.classes,
        )


def in_memory(data: Images, classes: tuple[str, ...] = ()) -> Source:
    """Return a source of images that are in memory already."""
    return Source(
        labels=data.labels,
        read=lambda rows: Images(data.images[rows], data.labels[rows]),
        classes=classes,
    )


def held_out(source: Source, share: float, kept: bool) -> Source:
    """Return a fixed stratified share of a source, or, with `kept`, what it leaves."""
    order = stratified_order(source.labels, SPLIT_SEED)
    size = round(len(order) * share)
    return source.part(order[size:].sort().values if kept else order[:size])


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Order indices so that every prefix holds the classes in their shares.

    To within one image where classes are of one size, nearly so where they are not.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        jitter = torch.rand(1, generator=generator, dtype=torch.float64)
        rank[members] = (torch.arange(len(members)) + jitter) / len(members)
    return rank.argsort()
