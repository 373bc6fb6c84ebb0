"""What "robust accuracy" of a stochastic defense may mean: every definition in use, side by side.

All are computed from one set of fresh draws of each image, which neither the attack nor the judge
has seen, and each has its clean baseline beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from torch import Tensor

from ebm_defense.defense import mean_logits
from ebm_defense.eval.judging.rules import has_majority, right_votes, vote_counts
from ebm_defense.eval.judging.statistics import Share, mean_share, worst_of

WORST = 10
Columns = dict[str, Sequence[object]]


def definition_columns(name: str, logits: Tensor, labels: Tensor) -> Columns:
    """Return what records keep of one set of fresh draws `[r, b, classes]`, under `name`."""
    counts = vote_counts(logits)
    failures = len(logits) - right_votes(counts, labels)
    by_mean = mean_logits(logits).argmax(-1) == labels
    return {
        f"{name}: draws": [len(logits)] * len(labels),
        f"{name}: failures": failures.tolist(),
        f"{name}: mean logits": by_mean.int().tolist(),
        f"{name}: majority": has_majority(counts, labels).int().tolist(),
    }


def _one_pass(records: pd.DataFrame, name: str) -> Share:
    """One draw an image, in the mean over draws (AutoAttack, RobustBench, ART)."""
    return mean_share(1.0 - records[f"{name}: failures"] / records[f"{name}: draws"])


def _mean_logits(records: pd.DataFrame, name: str) -> Share:
    """The mean logits of all draws (Hill, Mitchell, Zhu 2021)."""
    return mean_share(records[f"{name}: mean logits"])


def _majority(records: pd.DataFrame, name: str) -> Share:
    """The class that most draws vote for; a tie is a failure."""
    return mean_share(records[f"{name}: majority"])


def _worst(records: pd.DataFrame, name: str) -> Share:
    """No failure among `WORST` draws, or among all if there are fewer; unbiased."""
    pairs = zip(records[f"{name}: failures"], records[f"{name}: draws"], strict=True)
    return mean_share([worst_of(int(k), int(n), min(WORST, int(n))) for k, n in pairs])


DEFINITIONS: dict[str, Callable[[pd.DataFrame, str], Share]] = {
    "one pass (mean)": _one_pass,
    "mean logits of {draws}": _mean_logits,
    "majority of {draws}": _majority,
    "worst of {worst}": _worst,
}


def definition_table(records: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Return accuracies by definition and by what the images are.

    Args:
        records: a run's, one row an image.
        names: under which names the records keep draws, and how each is called in the table.
    """
    return pd.DataFrame(
        [
            _row(definition, called, records, name)
            for definition in DEFINITIONS
            for name, called in names.items()
            if f"{name}: draws" in records
        ]
    )


def _row(definition: str, called: str, records: pd.DataFrame, name: str) -> dict[str, object]:
    found, draws = DEFINITIONS[definition](records, name), int(records[f"{name}: draws"].max())
    return {
        "definition": definition.format(draws=draws, worst=min(WORST, draws)),
        "images of": called,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "images": found.total,
    }
