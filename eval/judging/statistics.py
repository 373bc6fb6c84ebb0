"""Intervals and tests for shares of images; images, not draws, are the unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom, norm

from ebm_defense.errors import UsageError

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Share(NamedTuple):
    """`right` of `total` images, and the ends of the share's confidence interval.

    `right` is no whole number where an image counts in part: as the mean of its draws or seeds.
    """

    right: float
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself; NaN of no images."""
        return self.right / self.total if self.total else float("nan")


def wilson(mean: float, total: float, confidence: float) -> tuple[float, float]:
    """Return the ends of Wilson's (1927) score interval, whose coverage is near its confidence."""
    z = float(norm.ppf(0.5 + confidence / 2.0))
    centre = mean + z * z / (2.0 * total)
    half = z * math.sqrt(mean * (1.0 - mean) / total + z * z / (4.0 * total * total))
    scale = 1.0 + z * z / total
    low, high = (centre - half) / scale, (centre + half) / scale
    return min(max(low, 0.0), mean), max(min(high, 1.0), mean)


def clopper_pearson(mean: float, total: float, confidence: float) -> tuple[float, float]:
    """Return the ends of Clopper and Pearson's (1934) interval, which covers no less than it says.

    Its ends are quantiles of the Beta(k, n − k + 1) and Beta(k + 1, n − k) distributions.
    """
    count, tail = mean * total, (1.0 - confidence) / 2.0
    low = float(beta.ppf(tail, count, total - count + 1.0)) if count > 0 else 0.0
    high = float(beta.ppf(1.0 - tail, count + 1.0, total - count)) if count < total else 1.0
    return low, high


INTERVALS = {"wilson": wilson, "clopper-pearson": clopper_pearson}


def share(
    count: int, total: int, confidence: float = CONFIDENCE, interval: str = "wilson"
) -> Share:
    """Return count/total with its interval; of no images, 0 to 1.

    Args:
        count: images that are right.
        total: images.
        confidence: between 0 and 1.
        interval: a name in `INTERVALS`: "wilson" or "clopper-pearson".

    Raises:
        UsageError: an unknown interval.
    """
    if interval not in INTERVALS:
        raise UsageError(f"unknown interval {interval!r}; choose one of {', '.join(INTERVALS)}.")
    if total == 0:
        return Share(0, 0, 0.0, 1.0)
    return Share(count, total, *INTERVALS[interval](count / total, total, confidence))


def mean_share(values: ArrayLike, confidence: float = CONFIDENCE) -> Share:
    """Return the mean of values in [0, 1], one an image, with an interval over images.

    The value of an image is the mean over its draws or seeds. Wilson's interval for Kish's
    effective number of images, n·m(1 − m)/v with m the mean and v the variance of the values, at
    least n: so values of 0 and 1 alone get `share`'s interval, and none ever has no width at an
    end of the scale.

    Raises:
        UsageError: a value outside [0, 1].
    """
    found = np.asarray(values, dtype=float)
    if found.size and not (found.min() >= 0.0 and found.max() <= 1.0):
        raise UsageError("the values of images must lie in [0, 1].")
    if not found.size:
        return Share(0.0, 0, 0.0, 1.0)
    mean, variance = float(found.mean()), float(found.var())
    most = mean * (1.0 - mean)
    # Rounding may leave a variance of 1e-17 where there is none.
    spread = max(variance / most, 1e-9) if most > 1e-12 else 1.0
    ends = wilson(mean, found.size / spread, confidence)
    return Share(float(found.sum()), int(found.size), *ends)


def over_seeds(verdicts: Sequence[ArrayLike], confidence: float = CONFIDENCE) -> Share:
    """Combine several seeds' verdicts on the same images: images stay the unit.

    Each image counts with its mean over seeds, and the interval is over images (`mean_share`);
    pooling all draws would claim as many images as there are verdicts.

    Args:
        verdicts: a seed's verdicts on all images, `[seeds, images]` of values in [0, 1].
        confidence: between 0 and 1.

    Raises:
        UsageError: no seeds, or seeds that judged different numbers of images.
    """
    rows = [np.asarray(v, dtype=float) for v in verdicts]
    if not rows or any(row.shape != rows[0].shape for row in rows):
        raise UsageError("seeds are combined over the same images; give one row a seed.")
    return mean_share(np.mean(rows, axis=0), confidence)


class Paired(NamedTuple):
    """Two defenses on the same images.

    Attributes:
        difference: mean of the first less the second.
        low, high: ends of its bootstrap interval.
        only_first, only_second: images where one is right alone.
        p_value: of the exact McNemar test.
    """

    difference: float
    low: float
    high: float
    only_first: int
    only_second: int
    p_value: float


def paired(
    first: ArrayLike, second: ArrayLike, *, confidence: float = CONFIDENCE, seed: int = 0
) -> Paired:
    """Compare two defenses' verdicts (0 or 1) on the same images, in the same order.

    Raises:
        UsageError: different numbers of images, none, or verdicts other than 0 and 1.
    """
    a, b = (np.asarray(v, dtype=float) for v in (first, second))
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UsageError("a paired comparison needs the verdicts of both on the same images.")
    if not set(np.unique([a, b])) <= {0.0, 1.0}:
        raise UsageError("a paired comparison needs verdicts of 0 or 1.")
    only_first, only_second = int((a > b).sum()), int((b > a).sum())
    low, high = bootstrap_difference(a - b, confidence=confidence, seed=seed)
    return Paired(
        float((a - b).mean()),
        low,
        high,
        only_first,
        only_second,
        mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test (1947) from the discordant pairs."""
    fewer, total = min(only_first, only_second), only_first + only_second
    return min(1.0, 2.0 * float(binom.cdf(fewer, total, 0.5)))


def bootstrap_difference(
    differences: ArrayLike, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean paired difference, over images.

    Half an image in each cell of the table (both right, first alone, second alone, both wrong)
    is added first, as Agresti and Min (2005) do: so pairs that never differ do not give an
    interval without a width.

    Args:
        differences: one an image, in [-1, 1].
        confidence: between 0 and 1.
        seed: seed of the resampling's own generator.
    """
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    values = np.concatenate([values, [-1.0, 0.0, 1.0]])
    weights = np.concatenate([counts, [0.5, 1.0, 0.5]])
    total = round(float(weights.sum()))
    # Resampling images is drawing how often each value occurs.
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn: NDArray[Any] = generator.multinomial(total, weights / weights.sum(), size=RESAMPLES)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(drawn @ values / total, [tail, 100.0 - tail])
    return float(low), float(high)


def worst_of(failures: int, draws: int, worst: int) -> float:
    """Return the unbiased estimate that none of `worst` fresh draws fails.

    C(N − k, M)/C(N, M) for k failures among N draws and M = `worst`: the share of all choices of
    M of the N draws that hold no failure.

    Raises:
        UsageError: not 0 ≤ failures ≤ draws, or not 1 ≤ worst ≤ draws.
    """
    if not (0 <= failures <= draws and 1 <= worst <= draws):
        raise UsageError(
            f"worst of {worst} needs at least {worst} draws and no more failures than draws, not "
            f"{failures} failures of {draws}."
        )
    return math.comb(draws - failures, worst) / math.comb(draws, worst)
