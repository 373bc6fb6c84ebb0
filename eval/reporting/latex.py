"""Tables in LaTeX: booktabs' rules, never wider than the text, in what characters pdflatex has."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Sequence

PACKAGES = r"% needs \usepackage{booktabs,graphicx}"
GAP = r"\addlinespace[3pt]"
SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    '"': "''",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
}
SIGNS = {
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≠": r"$\neq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "√": r"$\surd$",
    "∇": r"$\nabla$",
    "→": r"$\to$",
    "²": "$^2$",
    "³": "$^3$",
    "°": r"$^\circ$",
}
_GREEK = (
    "Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega alpha beta gamma delta varepsilon zeta eta "
    "theta iota kappa lambda mu nu xi pi rho varsigma sigma tau upsilon varphi chi psi omega"
)
GREEK = {
    letter: f"$\\{name}$"
    for letter, name in zip("ΓΔΘΛΞΠΣΦΨΩαβγδεζηθικλμνξπρςστυφχψω", _GREEK.split(), strict=True)
}
KNOWN = SPECIAL | SIGNS | GREEK | {"µ": r"$\mu$"}
ACCENTS = set("\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327")
"""Grave, acute, circumflex, tilde, diaeresis, ring, caron, cedilla."""
LETTERS = set("ßæÆøØåÅœŒłŁ")
Lines = Sequence[str]
"""A cell: its lines, in LaTeX."""
HEADING, WORDS = 14, 30
"""Characters of a line in a heading, and in a cell of words."""


def escape(text: str) -> str:
    """Return text as pdflatex prints it; a character that it has not, by its code point: U+4E2D."""
    known = unicodedata.normalize("NFC", re.sub(r"\s+", " ", text))
    # Two hyphens of a command line's option would become a dash.
    return "".join(map(_character, known)).replace("--", "-{}-")


def _character(character: str) -> str:
    if character in KNOWN:
        return KNOWN[character]
    parts = unicodedata.normalize("NFD", character)
    accented = parts[0].isascii() and ACCENTS.issuperset(parts[1:]) and character < "\u0180"
    if character in LETTERS or (accented and character.isprintable()):
        return character
    return f"U+{ord(character):04X}"


def bold(latex: str) -> str:
    """Return LaTeX in bold print."""
    return f"\\textbf{{{latex}}}"


def stacked(number: str, interval: str) -> Lines:
    """Return a cell of a number, in LaTeX, and its interval below it in small print."""
    return number, f"{{\\scriptsize {interval}}}"


def words(text: str, width: int = WORDS) -> Lines:
    """Return a cell of plain text in lines of at most so many characters, where words allow it."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return tuple(map(escape, lines or [""]))


def table(
    head: Sequence[str], body: Sequence[Sequence[Lines]], *, align: str, caption: str, notes: str
) -> str:
    """Return a table that stands between booktabs' rules, and shrinks where it would be too wide.

    Args:
        head: headings, in plain text.
        body: rows of cells.
        align: a letter a column: l, c or r.
        caption: one sentence above the table, in plain text.
        notes: all else that the numbers depend on, below it in small print, in plain text.
    """
    tall = any(len(cell) > 1 for row in body for cell in row)
    between = f"\n{GAP}\n" if tall else "\n"
    return "\n".join(
        [
            PACKAGES,
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escape(caption)}}}\\medskip",
            r"\sbox0{\small",
            f"\\begin{{tabular}}{{{align}}}",
            r"\toprule",
            *_rows([words(heading, HEADING) for heading in head], bottom=True),
            r"\midrule",
            between.join("\n".join(_rows(row)) for row in body),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
            r"\par\medskip",
            f"\\parbox{{\\linewidth}}{{\\footnotesize {escape(notes)}}}",
            r"\end{table}",
            "",
        ]
    )


def _rows(cells: Sequence[Lines], bottom: bool = False) -> list[str]:
    """Return a row of cells as one row of LaTeX for each of their lines."""
    height = max(map(len, cells))
    empty = [("",) * (height - len(cell)) for cell in cells]
    columns = [(*e, *c) if bottom else (*c, *e) for c, e in zip(cells, empty, strict=True)]
    return [_ended(" & ".join(line)) for line in zip(*columns, strict=True)]


def _ended(row: str) -> str:
    r"""End a row, whose predecessor's `\\` would take a "[" or "*" at its start for its own."""
    return f"{'{}' if row[:1] in ('[', '*') else ''}{row} \\\\"
