"""Which of a device's fast ways were found to compute what they should."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch

_checking: ContextVar[bool] = ContextVar("checking", default=False)


def trusted(device: torch.device, way: str) -> bool:
    """Return whether a way, a name in `precision.devices.CHECKS`, may be taken on a device.

    The first question about a device has all of its ways checked, which takes seconds and is kept
    (see `ebm_defense.precision.devices`). CPUs are checked by the project's tests.
    """
    return device.type == "cpu" or _checking.get() or way not in _failed(device)


@contextmanager
def under_check() -> Iterator[None]:
    """Take every way inside, as one must to check it."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


@cache
def _failed(device: torch.device) -> frozenset[str]:
    # Not at the top: the checks run chains, which run on engines.
    from ebm_defense.precision.devices import checked_device

    return frozenset(checked_device(device).failed)
