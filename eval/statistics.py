"""Intervals for shares of images; images, not draws, are the unit."""

from __future__ import annotations

from typing import NamedTuple

from scipy.stats import binomtest

CONFIDENCE = 0.95


class Share(NamedTuple):
    """`right` of `total` images, and the ends of the share's confidence interval."""

    right: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself; NaN of no images."""
        return self.right / self.total if self.total else float("nan")


def share(count: int, total: int, confidence: float = CONFIDENCE) -> Share:
    """Return count/total with its Wilson interval (Wilson 1927); of no images, 0 to 1."""
    if total == 0:
        return Share(0, 0, 0.0, 1.0)
    interval = binomtest(count, total).proportion_ci(confidence, method="wilson")
    return Share(count, total, float(interval.low), float(interval.high))
