"""Result files say where they come from, and no smaller run overwrites one."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from datetime import date
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def made(common, tmp_path: Path, size: int, text: str = "| a table |"):
    @dataclass(frozen=True, kw_only=True)
    class Tiny(common.Options):
        """A benchmark."""

        images: int = size

        def run(self):
            return common.Result("tiny", text, self.images)

    words = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert common.main(Tiny, words) == 0
    return tmp_path / "results" / "tiny.md", tmp_path / "out" / "tiny.md"


def test_a_smaller_run_leaves_a_larger_one_as_it_is(benchmark, tmp_path, capsys) -> None:
    common = benchmark("common")
    kept, _ = made(common, tmp_path, 10, "ten")
    kept, own = made(common, tmp_path, 9, "nine")
    assert kept.read_text().startswith("ten")
    assert own.read_text().startswith("nine")
    assert "holds a larger run and stays" in capsys.readouterr().out
    kept, _ = made(common, tmp_path, 10, "ten again")
    assert kept.read_text().startswith("ten again")
    kept, _ = made(common, tmp_path, 11, "eleven")
    assert kept.read_text().startswith("eleven")


def test_a_result_states_command_commit_date_and_machine(benchmark, tmp_path, monkeypatch) -> None:
    common = benchmark("common")
    monkeypatch.setattr("sys.argv", [str(common.ROOT / "benchmarks" / "tiny.py")])
    monkeypatch.setattr(common, "commit", lambda: "abc1234")
    kept, _ = made(common, tmp_path, 3)
    text = kept.read_text()
    assert f"`python benchmarks/tiny.py --out {tmp_path}/out" in text
    assert f"commit abc1234, {date.today().isoformat()}, " in text
    assert re.search(r"\d threads?.*, torch 2\.", text)
    assert common.size_of(kept) == 3


def test_a_commit_with_changes_is_called_so(benchmark, monkeypatch) -> None:
    common = benchmark("common")
    said = {"rev-parse": "abc1234", "status": " M a.py"}
    monkeypatch.setattr(common, "_git", lambda *words: said[words[0]])
    assert common.commit() == "abc1234 with changes"
    said["status"] = ""
    assert common.commit() == "abc1234"
    said["rev-parse"] = ""
    assert common.commit() == "unknown"


def test_a_mistake_is_one_sentence_and_status_2(benchmark, tmp_path, capsys) -> None:
    common, drop_in = benchmark("common"), benchmark("drop_in")
    assert common.main(drop_in.DropIn, ["--attacks", "magic", "--out", str(tmp_path)]) == 2
    assert "unknown attack 'magic'" in capsys.readouterr().err


def test_every_script_is_one_benchmark_whose_options_parse(benchmark, script) -> None:
    common, module = benchmark("common"), benchmark(script)
    kinds = common.benchmarks_of(module)
    assert len(kinds) == 1
    needed = [f.name for f in fields(kinds[0]) if f.default is MISSING]
    words = [word for name in needed for word in (f"--{name.replace('_', '-')}", "x")]
    assert common.parse(kinds[0], ["--seed", "7", *words]).seed == 7


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.md")), ids=lambda p: p.stem)
def test_every_kept_result_says_where_it_comes_from(benchmark, file) -> None:
    text = file.read_text(encoding="utf-8")
    assert benchmark("common").size_of(file) > 0
    assert re.search(r"commit [0-9a-f]{7}[^\n]* 20\d\d-\d\d-\d\d, \w+", text)
