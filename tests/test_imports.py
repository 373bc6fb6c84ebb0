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
LAZY = {"foolbox": 1, "torchattacks": 1, "art": 1, "torchvision": 1, "diffusers": 1}


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


def files_imported(path: Path, files: dict[str, Path]) -> set[Path]:
    """Return the files of this project that a file imports at its head, TYPE_CHECKING aside."""
    found: set[Path] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name may be a module of its own: from ebm_defense.eval.running import runner.
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files else node.module for name in inside]
        else:
            continue
        found |= {files[name] for name in names if name in files}
    return found - {path}


def modules() -> dict[str, Path]:
    """Return every module of the project by the name it is imported as."""
    found = {}
    for room in ("ebm_defense", "attacks", "eval", "commands"):
        home = () if room == "ebm_defense" else ("ebm_defense",)
        for path in sources(room):
            inside = path.relative_to(ROOT).with_suffix("").parts
            if room == "ebm_defense" and inside[1] in FORBIDDEN["ebm_defense"]:
                continue  # the links to the other rooms
            parts = [*home, *inside]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def circle_through(path: Path, graph: dict[Path, set[Path]]) -> list[Path] | None:
    """Return a way from a file back to itself, if there is one."""
    ways, seen = [[path]], set()
    while ways:
        way = ways.pop(0)
        for following in graph[way[-1]]:
            if following == path:
                return [*way, path]
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return None


def test_no_circle_of_files_exists() -> None:
    files = modules()
    graph = {path: files_imported(path, files) for path in files.values()}
    circles = [c for path in graph if (c := circle_through(path, graph))]
    assert not [[str(p.relative_to(ROOT)) for p in c] for c in circles[:1]]
    assert len(graph) > 100


def test_nothing_asks_a_purifier_what_kind_it_is() -> None:
    rooms = [p for room in ("ebm_defense", "attacks", "eval", "commands") for p in sources(room)]
    kinds = ("LangevinPurifier", "NoPurifier", "GaussianNoise")
    for path in {p.resolve() for p in rooms}:
        text = path.read_text(encoding="utf-8")
        assert not [k for k in kinds if f"isinstance(purifier, {k}" in text], path
        assert not [k for k in kinds if f"purifier, {k})" in text], path
