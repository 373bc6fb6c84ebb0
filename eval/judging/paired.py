"""Is one share of images above another? On different images, which no pairs join."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import fisher_exact

from ebm_defense.eval.judging.statistics import RESAMPLES, are_verdicts

AT_ONCE = 200


def unpaired(first: ArrayLike, second: ArrayLike) -> float:
    """Return the two-sided p-value for verdicts in [0, 1] on different images.

    Fisher's exact test where all are 0 or 1, else by drawn permutations of the images.
    """
    one, two = (np.asarray(v, dtype=float) for v in (first, second))
    if are_verdicts(one, two):
        table = [[int(x.sum()), len(x) - int(x.sum())] for x in (one, two)]
        return float(fisher_exact(np.array(table)).pvalue)
    pooled, least = np.concatenate([one, two]), abs(one.mean() - two.mean()) * (1.0 - 1e-9)
    generator, beyond = np.random.Generator(np.random.PCG64(0)), 0
    for _ in range(0, RESAMPLES, AT_ONCE):
        drawn = generator.permuted(np.tile(pooled, (AT_ONCE, 1)), axis=1)
        apart = drawn[:, : len(one)].mean(1) - drawn[:, len(one) :].mean(1)
        beyond += int((abs(apart) >= least).sum())
    return (1 + beyond) / (1 + RESAMPLES)
