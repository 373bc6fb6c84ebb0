"""A table as a value: what stands in it, and all that must be said with it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from ebm_defense.eval.judging.statistics import Share

NONE = "–"
"""Stands where nothing was measured."""


def percent(value: float) -> str:
    """Return a share as a rounded percentage, without its sign."""
    return f"{100 * value:.1f}"


def interval(found: Share) -> str:
    """Return the ends of a share's interval in percent, rounded."""
    return f"{percent(found.low)} to {percent(found.high)}"


class Column(NamedTuple):
    """A heading, and whether what stands below it is words ("l") or numbers ("c" or "r")."""

    title: str
    align: str = "l"


class Cell(NamedTuple):
    """What stands in one place.

    Attributes:
        text: words or a rounded number, as printed.
        interval: the rounded ends of a number's interval; empty without one.
        marks: the numbers of the table's footnotes that concern it.
        best: whether it is to stand out.
        exact: the unrounded number and the ends of its interval, or whatever else a file of data
            holds in its place; the text if empty.
    """

    text: str
    interval: str = ""
    marks: tuple[int, ...] = ()
    best: bool = False
    exact: tuple[Any, ...] = ()

    def inline(self, bold: str = "{}") -> str:
        """Return the cell on one line, one that stands out inside `bold`."""
        text = bold.format(self.text) if self.best else self.text
        return (f"{text} ({self.interval})" if self.interval else text) + self.marked

    @property
    def marked(self) -> str:
        """The marks as printed, as " [1, 3]"; empty without any."""
        return f" [{', '.join(map(str, sorted(self.marks)))}]" if self.marks else ""


def share_cell(found: Share | None, marks: Iterable[int] = (), best: bool = False) -> Cell:
    """Return the cell of a share in percent and its interval, or of nothing."""
    if found is None:
        return Cell(NONE, exact=(None,))
    exact = (found.value, found.low, found.high)
    return Cell(percent(found.value), interval(found), tuple(marks), best, exact)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, to be printed in any form by `RENDERERS`.

    Attributes:
        columns: the headings.
        rows: as many cells each.
        caption: one sentence that says what the numbers are.
        notes: sentences on which they depend, or that say how to read them.
        footnotes: what the marks 1, 2, … mean.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    notes: tuple[str, ...] = ()
    footnotes: tuple[str, ...] = ()

    @property
    def head(self) -> list[str]:
        """The headings' words."""
        return [column.title for column in self.columns]

    @property
    def below(self) -> str:
        """All that is said below the caption, as one paragraph."""
        marked = (f"[{i}] {note}" for i, note in enumerate(self.footnotes, 1))
        return " ".join(filter(None, [*self.notes, *marked]))


def plain_table(
    frame: pd.DataFrame,
    *,
    caption: str = "",
    notes: Sequence[str] = (),
    words: int = 1,
    floats: str = "",
) -> Table:
    """Return a table of what a data frame holds, each value as it is printed.

    Args:
        frame: a row a row.
        caption: one sentence that says what the numbers are.
        notes: sentences on which they depend.
        words: how many of the first columns hold words, not numbers.
        floats: the format of numbers that are no whole ones, as ".3g"; unrounded if not given.
    """
    columns = (Column(str(c), "l" if i < words else "r") for i, c in enumerate(frame.columns))
    rows = (
        tuple(Cell(_shown(value, floats), exact=(value,)) for value in row)
        for row in frame.itertuples(index=False)
    )
    return Table(columns=tuple(columns), rows=tuple(rows), caption=caption, notes=tuple(notes))


def _shown(value: Any, floats: str) -> str:
    if not isinstance(value, float):
        return str(value)
    return NONE if math.isnan(value) else format(value, floats)
