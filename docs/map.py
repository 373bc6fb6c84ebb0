"""Draw the map of the house from its imports: docs/map.svg.

    python docs/map.py

Each band is a part of the package, each box a folder of it; an arrow goes from a folder to one that
it imports, above the boxes to the right and below them to the left. What a band says it imports is
below it: imports run one way.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BANDS = {
    "commands": "the command line",
    "eval": "what a judge does",
    "attacks": "what an attacker does",
    "ebm_defense": "the defense",
}
"""The parts, top to bottom, by their folders."""
LEFT, BAND, BOX, GAP = 150, 150, (112, 40), 8
INK, PAPER, COLOURS = "#333333", "#ffffff", ("#7f7f7f", "#0072b2", "#d55e00", "#009e73")


class Room(NamedTuple):
    """A folder of a part: "judging" of "eval", or the part's own files."""

    part: str
    folder: str

    @property
    def title(self) -> str:
        """What stands in its box."""
        return f"{self.folder}/" if self.folder else "its own files"


class Place(NamedTuple):
    """The middle of a box's upper edge, and its height."""

    x: float
    y: float


def sources() -> Iterator[tuple[Room, Path]]:
    """Yield every file of the package, and the room that it is in."""
    for part in BANDS:
        for file in sorted((ROOT / part).rglob("*.py")):
            folder = file.parent.relative_to(ROOT / part)
            if folder.parts[:1] and folder.parts[0] in BANDS:
                continue  # the links to the other parts
            yield Room(part, folder.parts[0] if folder.parts else ""), file


def room_of(module: str) -> Room | None:
    """Return the room that a dotted name is in, or None if it is not ours."""
    head, *rest = module.split(".")
    if head != "ebm_defense":
        return None
    part = rest.pop(0) if rest and rest[0] in BANDS else "ebm_defense"
    inside = bool(rest) and (ROOT / part / rest[0]).is_dir()
    return Room(part, rest[0] if inside else "")


def imported(file: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges() -> set[tuple[Room, Room]]:
    """Return which room imports which other."""
    found = {
        (room, to) for room, file in sources() for name in imported(file) if (to := room_of(name))
    }
    return {(a, b) for a, b in found if a != b}


def places(rooms: set[Room]) -> dict[Room, Place]:
    """Return where each room's box stands."""
    found = {}
    for row, part in enumerate(BANDS):
        boxes = sorted(r for r in rooms if r.part == part)
        for i, room in enumerate(boxes):
            middle = LEFT + (i + 0.5) * (BOX[0] + GAP)
            found[room] = Place(middle, 70 + row * BAND)
    return found


def draw() -> str:
    """Return the map as SVG."""
    links = edges()
    where = places({room for room, _ in sources()})
    width = round(max(place.x for place in where.values()) + BOX[0] / 2 + 14)
    height = BAND * len(BANDS) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        *(band(row, part, links, width) for row, part in enumerate(BANDS)),
        *(arc(where[a], where[b]) for a, b in sorted(links) if a.part == b.part),
        *(box(room, place) for room, place in where.items()),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def band(row: int, part: str, links: set[tuple[Room, Room]], width: int) -> str:
    """Return a part's name, and the parts below that it imports."""
    below = [p for p in BANDS if p != part and any((a.part, b.part) == (part, p) for a, b in links)]
    y = 70 + row * BAND
    said = [f"imports {p}" for p in below] or ["imports no other part"]
    words = "".join(
        f'<text x="18" y="{y + 30 + 14 * i}" font-size="11" fill="{INK}">{html.escape(line)}</text>'
        for i, line in enumerate(said)
    )
    return (
        f'<rect x="6" y="{y - 58}" width="{width - 12}" height="{BAND - 12}" rx="6" fill="none" '
        f'stroke="{COLOURS[row]}"/>'
        f'<text x="18" y="{y - 10}" font-weight="bold" fill="{INK}">{part}/</text>'
        f'<text x="18" y="{y + 8}" font-size="11" fill="{INK}">{BANDS[part]}</text>{words}'
    )


def box(room: Room, place: Place) -> str:
    """Return a room's box."""
    colour = COLOURS[list(BANDS).index(room.part)]
    return (
        f'<rect x="{place.x - BOX[0] / 2}" y="{place.y}" width="{BOX[0]}" height="{BOX[1]}" '
        f'rx="5" fill="{PAPER}" stroke="{colour}" stroke-width="2"/>'
        f'<text x="{place.x}" y="{place.y + 25}" text-anchor="middle" fill="{INK}">'
        f"{html.escape(room.title)}</text>"
    )


def arc(start: Place, end: Place) -> str:
    """Return an arrow between two boxes of one band: to the right above them, else below."""
    right = end.x > start.x
    lean, up, y = (28, -1, start.y) if right else (-28, 1, start.y + BOX[1])
    x1, x2 = start.x + lean, end.x - lean
    top = y + up * 1.3 * (8 + 34 * abs(x2 - x1) / 850)
    return (
        f'<path d="M{x1:.0f} {y} C{x1:.0f} {top:.0f} {x2:.0f} {top:.0f} {x2:.0f} {y}" '
        f'fill="none" stroke="{INK}" stroke-opacity="0.65" marker-end="url(#tip)"/>'
    )


if __name__ == "__main__":
    (ROOT / "docs" / "map.svg").write_text(draw(), encoding="utf-8")
