"""Several runs side by side: one table, and the evidence that one is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ebm_defense.attacks.base import Attack
from ebm_defense.errors import UsageError
from ebm_defense.eval.job import WORST_OF_ALL
from ebm_defense.eval.judging.paired import unpaired
from ebm_defense.eval.judging.statistics import CONFIDENCE, Share, are_verdicts, paired_p_value
from ebm_defense.eval.reporting import latex
from ebm_defense.eval.reporting.captions import attack_details, verdict_caption
from ebm_defense.eval.reporting.flags import Flag
from ebm_defense.eval.reporting.page import render
from ebm_defense.eval.reporting.plots import FIGURES, draw_figures, inline_svg
from ebm_defense.eval.reporting.report import Report, attack_title, inline, stands_column
from ebm_defense.files import writable_folder, write_text
from ebm_defense.purifiers.registry import caption

LEVEL = 1.0 - CONFIDENCE
CLEAN, NONE = "clean", "–"
COSTS = ("Langevin steps a prediction", "Langevin steps in all")


class Source(NamedTuple):
    """Where a run's records hold a measurement, and the numbers of the attacks behind it."""

    column: str
    attacks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One thing measured of some of the runs.

    Attributes:
        title: stands over the column.
        note: what was done, for the footnote.
        judged: how it was judged.
        sources: where its numbers are, by the run's number.
        alike: what runs share that share the column.
    """

    title: str
    note: str
    judged: str
    sources: dict[int, Source]
    alike: tuple[str, ...]


class Cell(NamedTuple):
    """One cell in plain text: a number, its interval, its flags, and whether it is the best."""

    number: str
    interval: str = ""
    marks: str = ""
    best: bool = False

    def inline(self, bold: str = "{}") -> str:
        """Return the cell on one line, a best number inside `bold`."""
        number = bold.format(self.number) if self.best else self.number
        return (inline(number, self.interval) if self.interval else number) + self.marks

    def stacked(self) -> latex.Lines:
        """Return the cell in LaTeX, its interval below its number."""
        number = latex.escape(self.number)
        number = (latex.bold(number) if self.best else number) + latex.escape(self.marks)
        return latex.stacked(number, self.interval) if self.interval else [number]


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
        source = column.sources.get(row)
        return None if source is None else self.reports[row].share(source.column)

    def best(self, column: Column) -> int | None:
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

    def p_value(self, column: Column, first: int, second: int) -> float:
        """Return the p-value of a first run not being better: paired on the same images.

        Two-sided, and 1 where the first one is not ahead. By counts for runs of other images.
        """
        one, two = self._outcomes(column, first, doubt=0), self._outcomes(column, second, doubt=1)
        if one.mean() <= two.mean():
            return 1.0
        return (paired_p_value if self.same_images(first, second) else unpaired)(one, two)

    def _outcomes(self, column: Column, row: int, doubt: int | None = None) -> pd.Series:
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

    def header(self) -> list[str]:
        """Return the printed table's head."""
        return [self.heading, *(column.title for column in self.columns), *COSTS]

    def rows(self) -> list[list[Cell]]:
        """Return the printed table's body."""
        return [
            [
                Cell(report.name, marks=self._marks(_on_model(report))),
                *(self._cell(row, column) for column in self.columns),
                Cell(f"{report.prediction_cost():,.0f}"),
                Cell(f"{report.cost():,.0f}"),
            ]
            for row, report in enumerate(self.reports)
        ]

    def _cell(self, row: int, column: Column) -> Cell:
        found = self.share(row, column)
        if found is None:
            return Cell(NONE)
        return Cell(
            f"{100 * found.value:.1f}",
            f"{100 * found.low:.1f} to {100 * found.high:.1f}",
            self._marks(self._flags_on(row, column)),
            self.best(column) == row,
        )

    def _flags_on(self, row: int, column: Column) -> list[Flag]:
        flags, concerned = self.reports[row].flags, set(column.sources[row].attacks)
        return [flag for flag in flags if concerned & set(flag.attacks)]

    def _raised(self) -> list[str]:
        """Return the names of all runs' flags; a flag's mark is its place among them."""
        return list(dict.fromkeys(flag.name for r in self.reports for flag in r.flags))

    def _marks(self, flags: Sequence[Flag]) -> str:
        raised = self._raised()
        marks = sorted({raised.index(flag.name) + 1 for flag in flags})
        return f" [{', '.join(map(str, marks))}]" if marks else ""

    def footnote(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        purifiers = "; ".join(
            f"{r.name}: {caption(r.settings['defense']['purifier'])}" for r in self.reports
        )
        parts = [*self._measured(), f"Purifiers: {purifiers}.", COST_NOTE, _counts(self.reports)]
        return " ".join(filter(None, [*parts, self._tests(), *self._flag_notes()]))

    def caption(self) -> str:
        """Return one sentence that says what the numbers are."""
        wide = ", which is conservative for shares of predictions" if self._shares() else ""
        return f"Accuracy in % and its {CONFIDENCE:.0%} Wilson interval over images{wide}."

    def _shares(self) -> bool:
        """Return whether some images count in part."""
        cells = ((column, row) for column in self.columns for row in column.sources)
        return not all(are_verdicts(self._outcomes(*cell)) for cell in cells)

    def _measured(self) -> Iterator[str]:
        """Yield what was done for each column, and how those alike were judged."""
        for judged, columns in itertools.groupby(self.columns, key=lambda c: c.judged):
            yield from (f"{column.title}: {column.note}" for column in columns)
            if judged:
                yield judged

    def _tests(self) -> str:
        pairs = list(itertools.combinations(range(len(self.reports)), 2))
        if not pairs:
            return ""
        paired = [self.same_images(*pair) for pair in pairs]
        kind = "McNemar's exact test on the same images"
        if self._shares():
            kind = "a sign-flip permutation test of the differences on the same images"
        if not all(paired):
            named = "a permutation" if self._shares() else "Fisher's exact"
            other = f"{named} test, unpaired, because runs are of different images"
            kind = f"{kind} or {other}" if any(paired) else other
        level = f"{kind}, at {LEVEL:.0%} divided by the number of comparisons."
        if any(self.best(column) is not None for column in self.columns):
            return f"Bold: better than every other row by {level}"
        return f"No row is bold: none is better than every other one by {level}"

    def _flag_notes(self) -> Iterator[str]:
        """Yield what each mark means: the evidence, the runs that it was seen in, and advice."""
        for number, name in enumerate(self._raised(), 1):
            seen: dict[str, dict[str, None]] = {}
            for report in self.reports:
                for flag in (f for f in report.flags if f.name == name):
                    seen.setdefault(flag.evidence, {})[report.name] = None
                    advice = flag.advice
            found = "; ".join(f"{words} ({', '.join(names)})" for words, names in seen.items())
            yield f"[{number}] {name}: {found}. {advice}"

    def to_text(self) -> str:
        """Return the table and its footnote for a terminal; *stars* mark the best."""
        return f"{self._printed('*{}*').to_string(index=False)}\n\n{self._below()}\n"

    def to_markdown(self) -> str:
        """Return the table and its footnote as Markdown."""
        table = self._printed("**{}**").to_markdown(index=False, disable_numparse=True)
        return f"{table}\n\n{self._below()}\n"

    def _printed(self, bold: str) -> pd.DataFrame:
        cells = [[cell.inline(bold) for cell in row] for row in self.rows()]
        return pd.DataFrame(cells, columns=self.header())

    def _below(self) -> str:
        return f"{self.caption()} {self.footnote()}"

    def to_latex(self) -> str:
        """Return the table as LaTeX with booktabs, the footnote below it."""
        body = [
            [latex.words(name.number + name.marks), *(cell.stacked() for cell in cells)]
            for name, *cells in self.rows()
        ]
        align = f"l{'c' * len(self.columns)}{'r' * len(COSTS)}"
        return latex.table(
            self.header(), body, align=align, caption=self.caption(), notes=self.footnote()
        )

    def to_html(self) -> str:
        """Return a page of the table, its footnote and the figures."""
        drawn = [(drawing.draw(self.reports), drawing.caption) for drawing in FIGURES.values()]
        figures = [(inline_svg(figure), said) for figure, said in drawn if figure is not None]
        return render(
            "compare.html",
            head=self.header(),
            rows=self.rows(),
            footnote=self._below(),
            figures=figures,
        )

    def to_csv(self) -> str:
        """Return the long table as CSV, with unrounded numbers."""
        return self.table().to_csv(index=False)

    def save(self, folder: str | Path) -> Path:
        """Write comparison.txt, .md, .tex, .csv and .html, and the figures, into a folder."""
        path = writable_folder(folder)
        write_text(path / "comparison.txt", self.to_text())
        write_text(path / "comparison.md", self.to_markdown())
        write_text(path / "comparison.tex", self.to_latex())
        write_text(path / "comparison.csv", self.to_csv())
        write_text(path / "comparison.html", self.to_html())
        draw_figures(self.reports, path)
        return path


COST_NOTE = (
    "Costs are Langevin steps an image: of one prediction, by as many draws as its accuracy is of, "
    "and of the whole evaluation."
)


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
        name = None if sweep else report.name
        for number, column in enumerate(_measured(row, report, sweep)):
            key = number if sweep else column.alike
            found[key] = _join(found[key], column, name) if key in found else column
    columns = sorted(found.values(), key=lambda c: c.title == WORST_OF_ALL)
    titles = [column.title for column in columns]
    marks = iter(range(1, len(titles) + 1))
    return [
        replace(c, title=f"{c.title} #{next(marks)}") if titles.count(c.title) > 1 else c
        for c in columns
    ]


def _join(first: Column, second: Column, name: str | None) -> Column:
    note, judged = first.note, first.judged
    if second.note not in note:
        # The points of a sweep differ in what their names say; a run of a name says it here.
        as_rows = AS_ROWS + note.removeprefix(AS_ROWS)
        note = as_rows if name is None else f"{note} for {name}, {second.note}"
    if judged != second.judged:
        judged = "Judged as each row says."
    return replace(first, note=note, judged=judged, sources=first.sources | second.sources)


AS_ROWS = "as each row says, else "


def _measured(row: int, report: Report, sweep: bool) -> Iterator[Column]:
    """Yield what a run measured; of an ensemble only the worst of all, which no order can change.

    The worst of all is one column for runs whose attacks differ in their gradients alone, since an
    attacker takes the one that fits the defense.
    """
    protocol = report.protocol
    note, judged = _clean_note(report), verdict_caption(protocol, report.predicted_draws())
    yield Column(
        title=CLEAN, note=note, judged="", sources={row: Source("clean", ())}, alike=(CLEAN, note)
    )
    numbered = list(enumerate(protocol.attacks))
    for number, attack in numbered if not protocol.ensemble else []:
        details = attack_details(attack)
        yield Column(
            title=_family(attack) if sweep else attack_title(attack),
            note=details,
            judged=judged,
            sources={row: Source(stands_column(number, attack), (number,))},
            alike=(protocol.name, attack.name, details, judged),
        )
    if len(numbered) > 1:
        yield Column(
            title=WORST_OF_ALL,
            note=_worst_note(report),
            judged=judged,
            sources={row: Source(WORST_OF_ALL, tuple(i for i, _ in numbered))},
            alike=(protocol.name, judged, *map(_but_gradient, protocol.attacks)),
        )


def _but_gradient(attack: Attack) -> str:
    gradient = getattr(attack, "gradient", None)
    said = f"{attack.name}: {attack_details(attack)}"
    return said.replace(gradient.name, "") if gradient else said


EVERY_NOTE = "images that stand under every attack of their row."
WORST_NOTE = (
    "of each image the worst that an attack of its row found, chosen on draws of their own."
)


def _clean_note(report: Report) -> str:
    draws = report.protocol.judge_replicates
    if not report.judged_once():
        return f"right by the average of {draws} fresh draws."
    return "the images as they are, by the same rule and draws."


def _worst_note(report: Report) -> str:
    if report.judged_once():
        return WORST_NOTE
    attacks = report.protocol.attacks
    return _ensemble_note(attacks) if report.protocol.ensemble else EVERY_NOTE


def _family(attack: Attack) -> str:
    """Return an attack's title without its number of steps, which a sweep may vary."""
    return attack_title(attack).replace(f"-{getattr(attack, 'steps', '')}", "", 1)


def _ensemble_note(attacks: Sequence[Attack]) -> str:
    each = " ".join(f"{attack.name}: {attack_details(attack)}" for attack in attacks)
    return f"attacks one after the other on the images still standing. {each}"


def _on_model(report: Report) -> list[Flag]:
    return [flag for flag in report.flags if not flag.attacks]


def _counts(reports: Sequence[Report]) -> str:
    counts = sorted({len(r.records) for r in reports})
    seeds = sorted({r.settings["seed"] for r in reports})
    return f"{_listed(counts)} images, seed {_listed(seeds)}."


def _listed(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
