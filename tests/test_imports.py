"""The rooms of the house import one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "ebm_defense": ("attacks", "eval", "commands"),
    "attacks": ("eval", "commands"),
    "eval": ("commands",),
}
LAZY = {"foolbox": 1, "torchattacks": 1, "art": 1, "torchvision": 1}


def sources(room: str) -> list[Path]:
    return [p for p in (ROOT / room).rglob("*.py") if not p.parent.is_symlink()]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_never_imports_one_above_it(room: str) -> None:
    above = tuple(f"ebm_defense.{name}" for name in FORBIDDEN[room])
    files = sources(room)
    assert len(files) > 4
    for path in files:
        if room == "ebm_defense" and path.relative_to(ROOT / room).parts[0] in FORBIDDEN[room]:
            continue  # the links to the other rooms
        assert not [n for n in imported(path) if n.startswith(above)], path


@pytest.mark.parametrize("library", LAZY)
def test_a_foreign_library_is_imported_in_one_file_at_most(library: str) -> None:
    rooms = ["attacks", "eval", "commands"]
    files = {p.resolve() for room in [*rooms, "ebm_defense"] for p in sources(room)}
    users = [p for p in files if any(n.split(".")[0] == library for n in imported(p))]
    assert len(users) <= LAZY[library]


def test_only_one_function_unpickles() -> None:
    rooms = ["attacks", "eval", "commands", "ebm_defense"]
    files = {p.resolve() for room in rooms for p in sources(room)}
    assert [p.name for p in files if "torch.load(" in p.read_text(encoding="utf-8")] == ["files.py"]
