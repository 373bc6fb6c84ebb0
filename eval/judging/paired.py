"""Is one share of images above another? On the same images by pairs, else by counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import fisher_exact

from ebm_defense.eval.judging import statistics


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Return the exact two-sided p-value of McNemar (1947) for outcomes on the same images.

    Args:
        first: 0 or 1 an image.
        second: likewise, in the same order.
    """
    one, two = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    return statistics.mcnemar(int((one & ~two).sum()), int((two & ~one).sum()))


def unpaired(first: ArrayLike, second: ArrayLike) -> float:
    """Return Fisher's exact two-sided p-value for outcomes on different images."""
    table = [[int(np.sum(x)), len(x) - int(np.sum(x))] for x in map(np.asarray, (first, second))]
    return float(fisher_exact(np.array(table)).pvalue)
