"""What a run on corrupted images found: mean accuracy, by corruption and over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ebm_defense.eval.judging.statistics import Share, mean_share
from ebm_defense.eval.reporting.renderers import Printable
from ebm_defense.eval.reporting.table import Cell, Column, Table, interval, percent
from ebm_defense.eval.storage.columns import CLEAN
from ebm_defense.storage.files import write_text

MODELS = ("defended", "undefended")
CELLS, RECORDS = "cells.csv", "records.csv"
COLUMNS = (
    Column("corruption"),
    *(Column(f"{m} {what}", "r") for m in MODELS for what in ("%", "95% interval")),
)


@dataclass(frozen=True, kw_only=True)
class CorruptionReport(Printable):
    """Accuracy under corruptions.

    Attributes:
        records: a row for each image, corruption and severity (0 where clean), with `defended` and
            `undefended` 1 where it was classified correctly.
        caption: what the numbers depend on.
    """

    records: pd.DataFrame
    caption: str

    def mean(self, model: str = "defended", corruption: str | None = None) -> tuple[float, ...]:
        """Return the mean accuracy over severities (and corruptions), and its interval.

        Images are the interval's unit, since an image's results go together.
        """
        found = self._share(model, corruption)
        return found.value, found.low, found.high

    def _share(self, model: str, corruption: str | None) -> Share:
        chosen = self.records[self.records["corruption"] != CLEAN]
        if corruption is not None:
            chosen = self.records[self.records["corruption"] == corruption]
        return mean_share(chosen.groupby("image")[model].mean())

    def cells(self) -> pd.DataFrame:
        """Return a row for each corruption and severity, with Wilson intervals."""
        groups = self.records.groupby(["corruption", "severity"], sort=False)
        return pd.DataFrame([_cell(part) for _, part in groups])

    def table(self) -> pd.DataFrame:
        """Return a row for each corruption, over its severities, and one for their mean."""
        return pd.DataFrame([self._numbers(*named) for named in self._named()])

    def _named(self) -> list[tuple[str, str | None]]:
        names = list(dict.fromkeys(self.records["corruption"]))
        return [*((name, name) for name in names), ("mean", None)]

    def _numbers(self, title: str, corruption: str | None) -> dict[str, Any]:
        row: dict[str, Any] = {"corruption": title}
        for model in MODELS:
            ends = zip(("", " low", " high"), self.mean(model, corruption), strict=True)
            row |= {f"{model}{end}": value for end, value in ends}
        return row

    def printed(self) -> Table:
        """Return the table as it is printed, rounded."""
        rows = tuple(self._row(*named) for named in self._named())
        return Table(columns=COLUMNS, rows=rows, notes=(self.caption,))

    def _row(self, title: str, corruption: str | None) -> tuple[Cell, ...]:
        found = (self._share(model, corruption) for model in MODELS)
        numbers = (Cell(text) for one in found for text in (percent(one.value), interval(one)))
        return (Cell(title), *numbers)

    def save(self, folder: Path) -> None:
        """Write table.md, cells.csv and records.csv into a folder, each atomically."""
        write_text(folder / RECORDS, self.records.to_csv(index=False))
        write_text(folder / CELLS, self.cells().to_csv(index=False))
        self.write(folder, "table", "markdown")


def _cell(part: pd.DataFrame) -> dict[str, Any]:
    first = part.iloc[0]
    cell: dict[str, Any] = {"corruption": first["corruption"], "severity": first["severity"]}
    cell["images"] = len(part)
    for model in MODELS:
        found = mean_share(part[model])
        cell |= {model: found.value, f"{model}_low": found.low, f"{model}_high": found.high}
    return cell
