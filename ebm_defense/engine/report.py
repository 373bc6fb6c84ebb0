"""Saying once that something fast could not be used."""

from __future__ import annotations

import logging
from functools import cache

_log = logging.getLogger("ebm_defense")


@cache
def fell_back(engine: str, what: str, reason: str) -> None:
    """Say once that an engine could not be used and that the plain way was taken."""
    _log.warning("%s cannot run %s (%s); the plain way is taken.", engine, what, reason)
