"""What to do when the batch is too large for the memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError

T = TypeVar("T")
log = logging.getLogger(__name__)


def within_memory(defense: PurifiedClassifier, work: Callable[[], T]) -> T:
    """Do some work; out of GPU memory, do it again with half as many chains at a time.

    Raises:
        UsageError: not even one chain at a time fits.
    """
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        # Outside the handler, which would keep the failed work's tensors alive.
        _halve(defense, reason)


def _halve(defense: PurifiedClassifier, reason: str) -> None:
    if defense.max_chains == 1:
        raise UsageError(
            f"not even one chain at a time fits into the memory ({reason}); free memory, take a "
            "smaller model or --device cpu."
        )
    defense.max_chains //= 2
    torch.cuda.empty_cache()
    log.warning("out of memory; going on with %d chains at a time", defense.max_chains)


@contextmanager
def chains_restored(defense: PurifiedClassifier) -> Iterator[None]:
    """Give a defense its number of chains at a time back, whatever the work made of it."""
    before = defense.max_chains
    try:
        yield
    finally:
        defense.max_chains = before
