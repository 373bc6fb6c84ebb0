"""Several runs side by side: one table, and the evidence that one is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ebm_defense.attacks.base import Attack
from ebm_defense.errors import UsageError
from ebm_defense.eval.page import render
from ebm_defense.eval.paired import mcnemar, unpaired
from ebm_defense.eval.report import Report, attack_title
from ebm_defense.eval.runner import attack_column
from ebm_defense.eval.statistics import CONFIDENCE, Share, share
from ebm_defense.eval.wording import describe_attack, describe_purifier
from ebm_defense.files import writable_folder, write_text

LEVEL = 1.0 - CONFIDENCE
CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One thing measured of some of the runs.

    Attributes:
        title: stands over the column.
        note: everything its numbers depend on, for the footnote.
        outcomes: right or wrong an image, by the run's number.
    """

    title: str
    note: str
    outcomes: dict[int, pd.Series[Any]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs (rows) by attacks (columns).

    Attributes:
        reports: the runs, each under its own name.
        columns: what was measured.
        heading: what a row is.
    """

    reports: tuple[Report, ...]
    columns: tuple[Column, ...]
    heading: str = "defense"

    def share(self, row: int, column: Column) -> Share | None:
        """Return a cell, or None where the run has no such attack."""
        found = column.outcomes.get(row)
        return None if found is None else share(int(found.sum()), len(found))

    def best(self, column: Column) -> int | None:
        """Return the run that is better than every other one in a column beyond doubt.

        Each comparison is tested at 5% divided by the number of comparisons (Bonferroni).
        """
        if len(column.outcomes) < 2:
            return None
        top, *others = sorted(column.outcomes, key=lambda r: -column.outcomes[r].mean())
        level = LEVEL / len(others)
        sure = all(self.p_value(column, top, other) < level for other in others)
        return top if sure else None

    def p_value(self, column: Column, first: int, second: int) -> float:
        """Return the p-value of two runs being alike: paired on the same images, else by counts."""
        one, two = column.outcomes[first], column.outcomes[second]
        return (mcnemar if self.same_images(first, second) else unpaired)(one, two)

    def same_images(self, first: int, second: int) -> bool:
        """Tell whether two runs are of the same images."""
        one, two = (self.reports[i].settings["data"]["sha256"] for i in (first, second))
        return bool(one == two)

    def cost(self, row: int) -> float:
        """Return the chain-steps that an image of a run cost, all phases together."""
        report = self.reports[row]
        return sum(report.chain_steps.values()) / max(len(report.records), 1)

    def table(self) -> pd.DataFrame:
        """Return a row a run and column, with unrounded numbers."""
        return pd.DataFrame(
            [
                {
                    self.heading: self.reports[row].name,
                    "attack": column.title,
                    "accuracy": found.value,
                    "low": found.low,
                    "high": found.high,
                    "correct": found.right,
                    "images": found.total,
                    "best": self.best(column) == row,
                    "chain-steps an image": self.cost(row),
                    "measured by": column.note,
                }
                for column in self.columns
                for row in range(len(self.reports))
                if (found := self.share(row, column)) is not None
            ]
        )

    def header(self) -> list[str]:
        """Return the printed table's head."""
        return [self.heading, *(column.title for column in self.columns), "chain-steps an image"]

    def rows(self, bold: str = "{}") -> list[list[str]]:
        """Return the printed table's body, the best of a column inside `bold`."""
        return [
            [
                report.name,
                *(self._cell(row, c, bold) for c in self.columns),
                f"{self.cost(row):,.0f}",
            ]
            for row, report in enumerate(self.reports)
        ]

    def _cell(self, row: int, column: Column, bold: str) -> str:
        found = self.share(row, column)
        if found is None:
            return "–"
        text = f"{100 * found.value:.1f}"
        text = bold.format(text) if self.best(column) == row else text
        return f"{text} ({100 * found.low:.1f} to {100 * found.high:.1f})"

    def footnote(self) -> str:
        """Return everything the numbers depend on, in sentences."""
        measured = " ".join(f"{c.title}: {c.note}" for c in self.columns)
        purifiers = "; ".join(
            f"{r.name}: {describe_purifier(r.settings['defense']['purifier'])}"
            for r in self.reports
        )
        return (
            f"Accuracy in %, {CONFIDENCE:.0%} Wilson intervals. {measured} Purifiers: {purifiers}. "
            f"{_counts(self.reports)} {self._tests()}"
        )

    def _tests(self) -> str:
        pairs = list(itertools.combinations(range(len(self.reports)), 2))
        paired = [self.same_images(*pair) for pair in pairs]
        kind = "McNemar's exact test on the same images"
        if not all(paired):
            other = "Fisher's exact test, unpaired, because runs are of different images"
            kind = f"{kind} or {other}" if any(paired) else other
        return (
            f"Bold: better than every other row by {kind}, at {LEVEL:.0%} divided by the number "
            "of comparisons."
        )

    def to_text(self) -> str:
        """Return the table and its footnote for a terminal; *stars* mark the best."""
        table = pd.DataFrame(self.rows("*{}*"), columns=self.header())
        return f"{table.to_string(index=False)}\n\n{self.footnote()}\n"

    def to_markdown(self) -> str:
        """Return the table and its footnote as Markdown."""
        table = pd.DataFrame(self.rows("**{}**"), columns=self.header())
        return f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{self.footnote()}\n"

    def to_latex(self) -> str:
        """Return the table as LaTeX with booktabs, the footnote as its caption."""
        head = [escape_latex(word) for word in self.header()]
        body = [[escape_latex(cell) for cell in row] for row in self.rows("\0{}\1")]
        lines = [f"{' & '.join(row)} \\\\" for row in (head, *body)]
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                f"\\caption{{{escape_latex(self.footnote())}}}",
                f"\\begin{{tabular}}{{l{'c' * len(self.columns)}r}}",
                r"\toprule",
                lines[0],
                r"\midrule",
                *lines[1:],
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def to_html(self) -> str:
        """Return a page of the table and its footnote."""
        rows = [[_html_cell(cell) for cell in row] for row in self.rows("\0{}\1")]
        return render(
            "compare.html", head=self.header(), rows=rows, footnote=self.footnote(), figures=[]
        )

    def to_csv(self) -> str:
        """Return the long table as CSV, with unrounded numbers."""
        return self.table().to_csv(index=False)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.txt, .md, .tex, .csv and .html, and the figures, into a folder."""
        from ebm_defense.eval.plots import draw_figures

        path = writable_folder(folder)
        write_text(path / "comparison.txt", self.to_text())
        write_text(path / "comparison.md", self.to_markdown())
        write_text(path / "comparison.tex", self.to_latex())
        write_text(path / "comparison.csv", self.to_csv())
        write_text(path / "comparison.html", self.to_html())
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
    columns = _columns(reports, sweep)
    return Comparison(reports=tuple(reports), columns=tuple(columns), heading=heading)


def _columns(reports: Sequence[Report], sweep: bool) -> list[Column]:
    found: dict[object, Column] = {}
    for row, report in enumerate(reports):
        for key, column in _measured(row, report, sweep):
            known = found.setdefault(key, column)
            known.outcomes.update(column.outcomes)
    titles = [column.title for column in found.values()]
    marks = iter(range(1, len(titles) + 1))
    return [
        Column(title=f"{c.title} [{next(marks)}]", note=c.note, outcomes=c.outcomes)
        if titles.count(c.title) > 1
        else c
        for c in found.values()
    ]


def _measured(row: int, report: Report, sweep: bool) -> list[tuple[object, Column]]:
    """Return what a run measured, each under a key that alike measurements share."""
    draws = report.protocol.judge_replicates
    note = f"right by the mean of {draws} fresh draws."
    clean = Column(title=CLEAN, note=note, outcomes={row: report.records["clean"]})
    columns: list[tuple[object, Column]] = [((CLEAN, sweep or draws), clean)]
    for number, attack in enumerate(report.protocol.attacks):
        outcomes = {row: report.records[f"{attack_column(number, attack)}: stands"]}
        note = f"{describe_attack(attack)} Judged on {draws} fresh replicates."
        title = _family(attack) if sweep else attack_title(attack)
        note = "as each row says; " + note if sweep else note
        key = number if sweep else (report.protocol.name, note)
        columns.append((key, Column(title=title, note=note, outcomes=outcomes)))
    return columns


def _family(attack: Attack) -> str:
    """Return an attack's title without its number of steps, which a sweep may vary."""
    return attack_title(attack).replace(f"-{getattr(attack, 'steps', '')}", "", 1)


def _counts(reports: Sequence[Report]) -> str:
    counts = sorted({len(r.records) for r in reports})
    seeds = sorted({r.settings["seed"] for r in reports})
    return f"{_listed(counts)} images, seed {_listed(seeds)}."


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))


LATEX = {"\\": r"\textbackslash{}"} | {c: f"\\{c}" for c in "&%$#_{}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$"}
LATEX |= {"\0": r"\textbf{", "\1": "}"}


def escape_latex(text: str) -> str:
    """Return text as LaTeX prints it."""
    return "".join(LATEX.get(character, character) for character in text)


def _html_cell(cell: str) -> tuple[str, str]:
    """Return a cell's bold part and the rest."""
    bold, mark, rest = cell.removeprefix("\0").partition("\1")
    return (bold, rest) if mark else ("", cell)
