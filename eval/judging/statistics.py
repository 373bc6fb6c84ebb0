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
BOOTSTRAP = "bootstrap"
FLIPS_AT_ONCE = 1000
EXACT_FLIPS = 12
"""Differing images up to which all their signs are gone through."""


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
        interval: a name in `INTERVALS`, "wilson" or "clopper-pearson", or "bootstrap".

    Raises:
        UsageError: an unknown interval.
    """
    found = mean_share([1.0] * count + [0.0] * (total - count), confidence, interval)
    return found._replace(right=count)


def mean_share(
    values: ArrayLike, confidence: float = CONFIDENCE, interval: str = "wilson"
) -> Share:
    """Return the mean of values in [0, 1], one an image, with an interval over images.

    The value of an image is a share: of its predictions, draws or seeds. Values of 0 and 1 alone
    get `share`'s interval. For others Wilson's and Clopper and Pearson's at the mean are
    conservative: the variance of values in [0, 1] is at most m(1 − m), a coin's of the same mean.

    Args:
        values: one an image.
        confidence: between 0 and 1.
        interval: a name in `INTERVALS`, or "bootstrap", over images, as `bootstrap_mean` gives it.

    Raises:
        UsageError: a value outside [0, 1], or an unknown interval.
    """
    found = np.asarray(values, dtype=float)
    if found.size and not (found.min() >= 0.0 and found.max() <= 1.0):
        raise UsageError("the values of images must lie in [0, 1].")
    refuse_unknown(interval)
    if not found.size:
        return Share(0.0, 0, 0.0, 1.0)
    if interval == BOOTSTRAP:
        ends = bootstrap_mean(found, confidence=confidence)
    else:
        ends = INTERVALS[interval](float(found.mean()), found.size, confidence)
    return Share(float(found.sum()), int(found.size), *ends)


def refuse_unknown(interval: str) -> None:
    """Refuse an interval that there is not.

    Raises:
        UsageError: it is neither in `INTERVALS` nor the bootstrap.
    """
    known = [*INTERVALS, BOOTSTRAP]
    if interval not in known:
        raise UsageError(f"unknown interval {interval!r}; choose one of {', '.join(known)}.")


def bootstrap_mean(
    values: ArrayLike, *, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over images, half an image added at 0 and
    half at 1, so that images all alike do not give an interval without a width.

    Args:
        values: one an image, in [0, 1].
        confidence: between 0 and 1.
        seed: seed of the resampling's own generator.
    """
    return _bootstrap(values, {0.0: 0.5, 1.0: 0.5}, confidence, seed)


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
        only_first, only_second: images where one is right more often than the other; of verdicts
            of 0 and 1, where it is right alone.
        p_value: of the exact McNemar test where all verdicts are 0 or 1, else of `sign_flip`.
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
    """Compare two defenses' verdicts, in [0, 1], on the same images, in the same order.

    Raises:
        UsageError: different numbers of images, none, or verdicts outside [0, 1].
    """
    a, b = (np.asarray(v, dtype=float) for v in (first, second))
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UsageError("a paired comparison needs the verdicts of both on the same images.")
    if not (min(a.min(), b.min()) >= 0.0 and max(a.max(), b.max()) <= 1.0):
        raise UsageError("a paired comparison needs verdicts in [0, 1].")
    only_first, only_second = int((a > b).sum()), int((b > a).sum())
    low, high = bootstrap_difference(a - b, confidence=confidence, seed=seed)
    return Paired(
        float((a - b).mean()),
        low,
        high,
        only_first,
        only_second,
        paired_p_value(a, b),
    )


def paired_p_value(first: ArrayLike, second: ArrayLike) -> float:
    """Return the two-sided p-value of two verdicts' difference on the same images, in order.

    McNemar's exact test where all verdicts are 0 or 1, which is the sign-flip test there, and
    `sign_flip` else.
    """
    a, b = (np.asarray(v, dtype=float) for v in (first, second))
    if are_verdicts(a, b):
        return mcnemar(int((a > b).sum()), int((b > a).sum()))
    return sign_flip(a - b)


def are_verdicts(*values: ArrayLike) -> bool:
    """Return whether all values are 0 or 1."""
    return all(bool(np.isin(np.asarray(v, dtype=float), (0.0, 1.0)).all()) for v in values)


def sign_flip(differences: ArrayLike, *, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean paired difference by permutation (Fisher 1935).

    If neither of two defenses is better, an image's difference has either sign alike. All signs
    are gone through for few differing images, else `RESAMPLES` drawn ones, of which the observed
    one counts as one more, so that the test keeps its level exactly (Phipson and Smyth 2010).

    Args:
        differences: one an image.
        seed: seed of the signs' own generator.
    """
    found = np.asarray(differences, dtype=float)
    found = found[found != 0.0]
    least = abs(found.sum()) * (1.0 - 1e-9)  # sums of other signs may be off by rounding
    if found.size <= EXACT_FLIPS:
        bits = np.arange(2**found.size)[:, None] >> np.arange(found.size) & 1
        return float((abs((1.0 - 2.0 * bits) @ found) >= least).mean())
    generator = np.random.Generator(np.random.PCG64(seed))
    beyond = 0
    for _ in range(0, RESAMPLES, FLIPS_AT_ONCE):
        signs = generator.integers(0, 2, (FLIPS_AT_ONCE, found.size), dtype=np.int8)
        beyond += int((abs((1.0 - 2.0 * signs) @ found) >= least).sum())
    return (1 + beyond) / (1 + RESAMPLES)


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
    return _bootstrap(differences, {-1.0: 0.5, 0.0: 1.0, 1.0: 0.5}, confidence, seed)


def _bootstrap(
    values: ArrayLike, added: dict[float, float], confidence: float, seed: int
) -> tuple[float, float]:
    """Return the percentile interval of a mean, with parts of images `added` at these values."""
    found, counts = np.unique(np.asarray(values, dtype=float), return_counts=True)
    found = np.concatenate([found, list(added)])
    weights = np.concatenate([counts, list(added.values())])
    total = round(float(weights.sum()))
    # Resampling images is drawing how often each value occurs.
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn: NDArray[Any] = generator.multinomial(total, weights / weights.sum(), size=RESAMPLES)
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(drawn @ found / total, [tail, 100.0 - tail])
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
