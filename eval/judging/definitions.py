"""What "robust accuracy" of a stochastic defense may mean: every definition in use, side by side.

All are computed from one set of fresh draws of each image, which no attack has seen and which
decided nothing of what is drawn, and each has its clean baseline beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from torch import Tensor

from ebm_defense.defense import mean_logits
from ebm_defense.eval.judging.rules import (
    Combine,
    as_deployed,
    has_majority,
    right_votes,
    vote_counts,
)
from ebm_defense.eval.judging.statistics import Share, mean_share, worst_of
from ebm_defense.eval.storage.columns import Columns, Kept, column, under

WORST = 10


def definition_columns(
    name: str, logits: Tensor, labels: Tensor, combine: Combine, predicted: int
) -> Columns:
    """Return what records keep of one set of fresh draws, under `name`.

    Args:
        name: of what was drawn.
        logits: `[r, b, classes]`.
        labels: true classes `[b]`.
        combine: the defense's own average.
        predicted: R, the draws that one prediction of the defense averages.
    """
    counts = vote_counts(logits)
    failures = len(logits) - right_votes(counts, labels)
    by_mean = mean_logits(logits).argmax(-1) == labels
    return under(
        name,
        {
            Kept.AS_DEPLOYED: as_deployed(logits, labels, combine, predicted).tolist(),
            Kept.DRAWS: [len(logits)] * len(labels),
            Kept.FAILURES: failures.tolist(),
            Kept.MEAN_LOGITS: by_mean.int().tolist(),
            Kept.MAJORITY: has_majority(counts, labels).int().tolist(),
            Kept.PREDICTED: combine(logits).argmax(-1).tolist(),
        },
    )


def _as_deployed(records: pd.DataFrame, name: str, interval: str) -> Share | None:
    """The average of as many draws as the defense predicts by, in the mean over predictions."""
    found = records.get(column(name, Kept.AS_DEPLOYED))
    # Old records have none, and fewer draws than a prediction takes give none.
    return None if found is None or found.isna().any() else mean_share(found, interval=interval)


def _one_pass(records: pd.DataFrame, name: str, interval: str) -> Share:
    """One draw an image, in the mean over draws (AutoAttack, RobustBench, ART)."""
    right = 1.0 - records[column(name, Kept.FAILURES)] / records[column(name, Kept.DRAWS)]
    return mean_share(right, interval=interval)


def _mean_logits(records: pd.DataFrame, name: str, interval: str) -> Share:
    """The mean logits of all draws (Hill, Mitchell, Zhu 2021)."""
    return mean_share(records[column(name, Kept.MEAN_LOGITS)], interval=interval)


def _majority(records: pd.DataFrame, name: str, interval: str) -> Share:
    """The class that most draws vote for; a tie is a failure."""
    return mean_share(records[column(name, Kept.MAJORITY)], interval=interval)


def _worst(records: pd.DataFrame, name: str, interval: str) -> Share:
    """No failure among `WORST` draws, or among all if there are fewer; unbiased."""
    pairs = zip(
        records[column(name, Kept.FAILURES)], records[column(name, Kept.DRAWS)], strict=True
    )
    each = [worst_of(int(k), int(n), min(WORST, int(n))) for k, n in pairs]
    return mean_share(each, interval=interval)


DEFINITIONS: dict[str, Callable[[pd.DataFrame, str, str], Share | None]] = {
    "as deployed ({predicted})": _as_deployed,
    "one pass (mean)": _one_pass,
    "mean logits of {draws}": _mean_logits,
    "majority of {draws}": _majority,
    "worst of {worst}": _worst,
}
"""Each maps records, the name of draws in them and of an interval to accuracy; None where the
records do not tell."""


def label(definition: str, draws: int, predicted: int) -> str:
    """Return a definition's name in tables.

    Args:
        definition: a name in `DEFINITIONS`.
        draws: H, of each image.
        predicted: R, the draws that one prediction of the defense averages.
    """
    return definition.format(draws=draws, worst=min(WORST, draws), predicted=predicted)


def definition_table(
    records: pd.DataFrame, names: dict[str, str], predicted: int, interval: str
) -> pd.DataFrame:
    """Return accuracies by definition and by what the images are.

    Args:
        records: a run's, one row an image.
        names: under which names the records keep draws, and how each is called in the table.
        predicted: R, the draws that one prediction of the defense averages.
        interval: a name in `INTERVALS`, or "bootstrap".
    """
    rows = []
    for definition, by in DEFINITIONS.items():
        for name, called in names.items():
            if column(name, Kept.DRAWS) not in records:
                continue
            if (found := by(records, name, interval)) is not None:
                draws = int(records[column(name, Kept.DRAWS)].max())
                rows.append(_row(label(definition, draws, predicted), called, found))
    return pd.DataFrame(rows)


def _row(definition: str, called: str, found: Share) -> dict[str, object]:
    return {
        "definition": definition,
        "images of": called,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "images": found.total,
    }
