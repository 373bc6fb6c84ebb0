"""Copy tables from result files into the README, between marks that name them.

    python docs/fill.py            # rewrites README.md
    python docs/fill.py --check    # only says, by its exit status, whether it is up to date

A mark is `<!-- from FILE -->` or `<!-- from FILE: COLUMN | COLUMN -->`, and below it
`<!-- end -->`. The first copies the file without the line that says where it comes from, the second
some columns of its first table, in that order.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKED = re.compile(
    r"(?P<mark><!-- from (?P<file>[^\s:]+)(?:: (?P<columns>.+?))? -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
MADE, WIDTH = re.compile(r"commit [0-9a-f]{7}"), 118


def filled(text: str) -> str:
    """Return a text with what stands between its marks copied anew."""
    return MARKED.sub(
        lambda m: f"{m['mark']}\n{content(m['file'], m['columns'])}\n\n{m['end']}", text
    )


def content(file: str, columns: str | None) -> str:
    """Return what a mark asks for."""
    parts = (ROOT / file).read_text(encoding="utf-8").strip().split("\n\n")
    if columns is None:
        kept = [p for p in parts if not (MADE.search(p) or p.startswith("<!--"))]
        return "\n\n".join(p if p.startswith("|") else wrapped(p) for p in kept)
    return chosen(next(p for p in parts if p.startswith("|")), columns.split(" | "))


def wrapped(paragraph: str) -> str:
    """Return a paragraph in lines of a readable length."""
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def chosen(table: str, columns: list[str]) -> str:
    """Return some columns of a table in Markdown."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    places = [cells[0].index(column) for column in columns]
    rows = [[row[i] for i in places] for row in cells]
    del rows[1]
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(places))]
    rows.insert(1, [f":{'-' * (width - 1)}" for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows
    )


def main() -> int:
    """Rewrite the README, or check it; return 1 if it is out of date."""
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
