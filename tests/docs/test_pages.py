"""README and documentation are whole: links lead somewhere, tables are those that were measured."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
API = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import one of the scripts in docs/."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(ROOT / "docs")
        return importlib.import_module(name)

    return load


def test_the_readme_s_tables_are_those_of_the_results(script) -> None:
    fill = script("fill")
    assert fill.filled(README) == README, "run python docs/fill.py"
    assert len(fill.MARKED.findall(README)) == 2


def test_a_mark_copies_a_result_or_some_of_its_columns(script, tmp_path, monkeypatch) -> None:
    fill = script("fill")
    (tmp_path / "found.md").write_text(
        "| a | b | c |\n|:--|:--|:--|\n| 1 | 22 | 3 |\n\nWhat it is.\n\n`cmd`, commit abcdef1, "
        "today.\n\n<!-- size: 1 -->\n"
    )
    monkeypatch.setattr(fill, "ROOT", tmp_path)
    whole = fill.filled("<!-- from found.md -->\nold\n<!-- end -->")
    assert "| 1 | 22 | 3 |" in whole
    assert "What it is." in whole
    assert not re.search("old|commit|size", whole)
    some = fill.filled("<!-- from found.md: c | b -->\n<!-- end -->")
    assert "| c   | b   |\n| :-- | :-- |\n| 3   | 22  |" in some


def test_the_readme_is_short_and_its_links_lead_to_files() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 200
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) > 8
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("room", ["ebm_defense", "ebm_defense.attacks", "ebm_defense.eval"])
def test_every_public_name_is_documented_once(room: str) -> None:
    words = [
        word
        for block in re.findall(rf"\.\. names:: {re.escape(room)}\n\n((?:   [^\n]*\n)+)", API)
        for word in block.split()
    ]
    assert sorted(words) == sorted(importlib.import_module(room).__all__)


def test_the_map_shows_every_folder_and_only_imports_that_go_down(script) -> None:
    house = script("map")
    rooms = {room for room, _ in house.sources()}
    folders = {f"{room.folder}/" for room in rooms if room.folder}
    assert {"gradients/", "judging/", "purifiers/"} <= folders
    shown = set(
        re.findall(r"middle\" fill=\"#333333\">([^<]+)<", (ROOT / "docs/map.svg").read_text())
    )
    assert shown == folders | {"its own files"}, "run python docs/map.py"
    order = list(house.BANDS)
    assert all(order.index(a.part) <= order.index(b.part) for a, b in house.edges())


def test_the_results_show_every_model_card_and_result_file() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    said = page + (ROOT / "docs" / "reading-a-verdict.md").read_text(encoding="utf-8") + README
    files = [*ROOT.glob("checkpoints/*/README.md"), *ROOT.glob("benchmarks/results/*.md")]
    assert len(files) > 10
    assert not [str(f.relative_to(ROOT)) for f in files if str(f.relative_to(ROOT)) not in said]
