"""A run that meets too little memory goes on with fewer chains at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ebm_defense.defense import PurifiedClassifier


@contextmanager
def chains_restored(defense: PurifiedClassifier) -> Iterator[None]:
    """Give a defense its number of chains at a time back, whatever the work made of it."""
    before = defense.max_chains
    try:
        yield
    finally:
        defense.max_chains = before
