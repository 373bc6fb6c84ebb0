"""Several runs side by side: one table, and the evidence that one is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.paired import unpaired
from ebm_defense.eval.judging.statistics import CONFIDENCE, Share, are_verdicts, paired_p_value
from ebm_defense.eval.reporting import captions
from ebm_defense.eval.reporting.figures.drawing import inline_svg
from ebm_defense.eval.reporting.figures.plots import FIGURES, draw_figures
from ebm_defense.eval.reporting.flags.evidence import Flag
from ebm_defense.eval.reporting.measurements import Measurement, measurements
from ebm_defense.eval.reporting.page import render
from ebm_defense.eval.reporting.renderers import RENDERERS, Printable
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.reporting.table import Cell, Column, Table, share_cell
from ebm_defense.storage.files import writable_folder

LEVEL = 1.0 - CONFIDENCE
COSTS = (Column("Langevin steps a prediction", "r"), Column("Langevin steps in all", "r"))


@dataclass(frozen=True, kw_only=True)
class Comparison(Printable):
    """Runs (rows) by attacks (columns).

    Attributes:
        reports: the runs, each under its own name.
        columns: what was measured.
        heading: what a row is.
    """

    reports: tuple[Report, ...]
    columns: tuple[Measurement, ...]
    heading: str = "defense"

    def share(self, row: int, column: Measurement) -> Share | None:
        """Return a cell, or None where the run has no such attack."""
        source = column.sources.get(row)
        return None if source is None else self.reports[row].share(source.column)

    def best(self, column: Measurement) -> int | None:
        """Return the run that is better than every other one in a column beyond doubt.

        Each comparison is tested at 5% divided by the number of comparisons (Bonferroni). Images
        left undecided count as the runs' verdicts on them would least speak for the best one.
        """
        if len(column.sources) < 2:
            return None
        top, *others = sorted(column.sources, key=lambda r: -self._outcomes(column, r).mean())
        level = LEVEL / len(others)
        sure = all(self.p_value(column, top, other) < level for other in others)
        return top if sure else None

    def p_value(self, column: Measurement, first: int, second: int) -> float:
        """Return the p-value of a first run not being better: paired on the same images.

        Two-sided, and 1 where the first one is not ahead. By counts for runs of other images.
        """
        one, two = self._outcomes(column, first, doubt=0), self._outcomes(column, second, doubt=1)
        if one.mean() <= two.mean():
            return 1.0
        return (paired_p_value if self.same_images(first, second) else unpaired)(one, two)

    def _outcomes(self, column: Measurement, row: int, doubt: int | None = None) -> pd.Series:
        """Return right or wrong an image; undecided images as `doubt` says, if it does."""
        return self.reports[row].outcomes(column.sources[row].column, doubt)

    def same_images(self, first: int, second: int) -> bool:
        """Tell whether two runs are of the same images."""
        one, two = (self.reports[i].settings["data"]["sha256"] for i in (first, second))
        return bool(one == two)

    def table(self) -> pd.DataFrame:
        """Return a row a run and column, with unrounded numbers."""
        return pd.DataFrame(
            [
                {
                    self.heading: report.name,
                    "attack": column.title,
                    "accuracy": found.value,
                    "low": found.low,
                    "high": found.high,
                    "correct": found.right,
                    "images": found.total,
                    "best": self.best(column) == row,
                    "flags": "; ".join(f.name for f in self._flags_on(row, column)),
                    "chain-steps a prediction": report.prediction_cost(),
                    "chain-steps an image": report.cost(),
                    "measured by": f"{column.note} {column.judged}".strip(),
                }
                for column in self.columns
                for row, report in enumerate(self.reports)
                if (found := self.share(row, column)) is not None
            ]
        )

    def printed(self) -> Table:
        """Return the table as it is printed: a row a run, a column an attack, then what it cost."""
        measured = (Column(column.title, "c") for column in self.columns)
        return Table(
            columns=(Column(self.heading), *measured, *COSTS),
            rows=tuple(self._row(*numbered) for numbered in enumerate(self.reports)),
            caption=captions.comparison_caption(parts=self._shares()),
            notes=tuple(self._notes()),
            footnotes=tuple(map(self._footnote, self._raised())),
        )

    def _row(self, row: int, report: Report) -> tuple[Cell, ...]:
        on_model = [flag for flag in report.flags if not flag.attacks]
        return (
            Cell(report.name, marks=self._marks(on_model)),
            *(self._cell(row, column) for column in self.columns),
            Cell(f"{report.prediction_cost():,.0f}"),
            Cell(f"{report.cost():,.0f}"),
        )

    def _cell(self, row: int, column: Measurement) -> Cell:
        if row not in column.sources:
            return share_cell(None)
        marks = self._marks(self._flags_on(row, column))
        return share_cell(self.share(row, column), marks, self.best(column) == row)

    def _flags_on(self, row: int, column: Measurement) -> list[Flag]:
        flags, concerned = self.reports[row].flags, set(column.sources[row].attacks)
        return [flag for flag in flags if concerned & set(flag.attacks)]

    def _raised(self) -> list[str]:
        """Return the names of all runs' flags; a flag's mark is its place among them."""
        return list(dict.fromkeys(flag.name for r in self.reports for flag in r.flags))

    def _marks(self, flags: Sequence[Flag]) -> tuple[int, ...]:
        raised = self._raised()
        return tuple(sorted({raised.index(flag.name) + 1 for flag in flags}))

    def _footnote(self, name: str) -> str:
        found = [(r.name, flag) for r in self.reports for flag in r.flags if flag.name == name]
        return captions.shared_flag_caption(found)

    def footnote(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        return self.printed().below

    def _notes(self) -> Iterator[str]:
        for judged, columns in itertools.groupby(self.columns, key=lambda c: c.judged):
            yield from (f"{column.title}: {column.note}" for column in columns)
            yield judged
        yield captions.purifiers_caption({r.name: r.settings["defense"] for r in self.reports})
        yield captions.COSTS
        yield captions.counts_caption(
            [len(r.records) for r in self.reports], [r.settings["seed"] for r in self.reports]
        )
        if len(self.reports) > 1:
            yield self._tests()

    def _shares(self) -> bool:
        """Return whether some images count in part."""
        cells = ((column, row) for column in self.columns for row in column.sources)
        return not all(are_verdicts(self._outcomes(*cell)) for cell in cells)

    def _tests(self) -> str:
        pairs = itertools.combinations(range(len(self.reports)), 2)
        return captions.tests_caption(
            level=LEVEL,
            paired=[self.same_images(*pair) for pair in pairs],
            parts=self._shares(),
            bold=any(self.best(column) is not None for column in self.columns),
        )

    def to_html(self) -> str:
        """Return a page of the table, what is said with it, and the figures."""
        drawn = [(drawing.draw(self.reports), drawing.caption) for drawing in FIGURES.values()]
        figures = [(inline_svg(figure), said) for figure, said in drawn if figure is not None]
        table = RENDERERS["html"](self.printed())
        return render("compare.html", table=table, figures=figures)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.txt, .md, .tex, .csv and .html, and the figures, into a folder."""
        path = writable_folder(folder)
        self.write(path, "comparison", *RENDERERS)
        draw_figures(self.reports, path)
        return path


def compare(
    reports: Sequence[Report], *, heading: str = "defense", sweep: bool = False
) -> Comparison:
    """Put runs side by side.

    Args:
        reports: from `evaluate` or `load_run`, each of another name.
        heading: what a row is.
        sweep: the runs are points of one sweep, whose names say what differs between them: columns
            then are the protocol's attacks, whatever their settings.

    Raises:
        UsageError: no runs, or two of the same name.
    """
    names = [report.name for report in reports]
    if not names:
        raise UsageError("compare needs at least one run.")
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two runs are called {', '.join(sorted(twice))}; give each a name.")
    columns = measurements(reports, sweep)
    return Comparison(reports=tuple(reports), columns=tuple(columns), heading=heading)
