"""The forms in which every table is printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ebm_defense.errors import UsageError
from ebm_defense.eval.reporting import latex
from ebm_defense.eval.reporting.page import render
from ebm_defense.eval.reporting.table import Cell, Table, plain_table
from ebm_defense.storage.files import write_text


def _text(table: Table) -> str:
    """For a terminal: *stars* around what stands out."""
    rows = [table.head, *_inline(table, "*{}*")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = [str.ljust if column.align == "l" else str.rjust for column in table.columns]
    lines = (
        "  ".join(to(cell, width) for to, cell, width in zip(justify, row, widths, strict=True))
        for row in rows
    )
    return _with_words("\n".join(line.rstrip() for line in lines), table)


def _markdown(table: Table) -> str:
    printed = pd.DataFrame(_inline(table, "**{}**"), columns=table.head)
    return _with_words(printed.to_markdown(index=False, disable_numparse=True), table)


def _latex(table: Table) -> str:
    """With booktabs' rules, the interval of a number below it."""
    aligned = [column.align for column in table.columns]
    return latex.table(
        table.head,
        [[_lines(*placed) for placed in zip(row, aligned, strict=True)] for row in table.rows],
        align="".join(aligned),
        caption=table.caption,
        notes=table.below,
    )


def _csv(table: Table) -> str:
    """With unrounded numbers, the ends of intervals in columns of their own."""
    columns: dict[str, list[object]] = {}
    for i, title in enumerate(table.head):
        cells = [row[i] for row in table.rows]
        ends = ("", " low", " high") if any(cell.interval for cell in cells) else ("",)
        for place, end in enumerate(ends):
            columns[f"{title}{end}"] = [_exact(cell, place) for cell in cells]
    return pd.DataFrame(columns).to_csv(index=False)


def _html(table: Table) -> str:
    """To stand in a page: the interval of a number below it, and the words below the table."""
    return render("table.html", table=table)


RENDERERS: dict[str, Callable[[Table], str]] = {
    "text": _text,
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
    "html": _html,
}
"""Each writes a table with all that is said with it, CSV without."""

SUFFIXES = {"text": "txt", "markdown": "md", "latex": "tex", "csv": "csv", "html": "html"}


class Printable:
    """What is printed as a table: a subclass gives it by `printed`, and its numbers by `table`."""

    def printed(self) -> Table:
        """Return the table as it is printed, rounded."""
        raise NotImplementedError

    def table(self) -> pd.DataFrame:
        """Return its numbers, unrounded."""
        raise NotImplementedError

    def to(self, form: str) -> str:
        """Return the table in a form by its name in `RENDERERS`; CSV holds unrounded numbers.

        Raises:
            UsageError: there is no such form.
        """
        if form not in RENDERERS:
            raise UsageError(f"unknown form {form!r}; choose one of {', '.join(RENDERERS)}.")
        return RENDERERS[form](plain_table(self.table()) if form == "csv" else self.printed())

    def to_text(self) -> str:
        """Return the table and its caption for a terminal; *stars* mark the best."""
        return self.to("text")

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        return self.to("markdown")

    def to_latex(self) -> str:
        """Return the table as LaTeX with booktabs, its caption included."""
        return self.to("latex")

    def to_csv(self) -> str:
        """Return the table's numbers as CSV, unrounded."""
        return self.to("csv")

    def to_html(self) -> str:
        """Return the table and its caption as HTML."""
        return self.to("html")

    def write(self, folder: Path, stem: str, *forms: str) -> None:
        """Write the table into a folder, in each of these forms, by names in `RENDERERS`."""
        for form in forms:
            write_text(folder / f"{stem}.{SUFFIXES.get(form, form)}", self.to(form))


def _inline(table: Table, bold: str) -> list[list[str]]:
    return [[cell.inline(bold) for cell in row] for row in table.rows]


def _with_words(shown: str, table: Table) -> str:
    said = " ".join(filter(None, [table.caption, table.below]))
    return f"{shown}\n\n{said}\n" if said else f"{shown}\n"


def _lines(cell: Cell, align: str) -> latex.Lines:
    if align == "l":
        return latex.words(f"{cell.text}{cell.marked}")
    text = latex.escape(cell.text)
    text = (latex.bold(text) if cell.best else text) + latex.escape(cell.marked)
    return latex.stacked(text, cell.interval) if cell.interval else [text]


def _exact(cell: Cell, place: int) -> object:
    if place < len(cell.exact):
        return cell.exact[place]
    return cell.text if place == 0 and not cell.exact else None
