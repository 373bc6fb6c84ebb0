"""What is done with finished runs: merge, verify, compare, report; and sweeps."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

from ebm_defense.commands.evaluation.evaluate import Evaluate
from ebm_defense.commands.main import main
from ebm_defense.commands.options.sweep import grid
from ebm_defense.errors import UsageError

SMALL = ("--data", "digits", "--images", 6, "--steps", 2, "--replicates", 2)


def words(defense: Path, out: Path, *more: object) -> list[str]:
    given = ("evaluate", "--defense", defense, *SMALL, "--judge-replicates", 3, "--out", out, *more)
    return [str(word) for word in given]


@pytest.fixture(scope="module")
def kept(tiny_defense, tmp_path_factory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("kept") / "tiny"
    assert main(words(tiny_defense, out)) == 0
    return out


@pytest.fixture
def finished(kept, tmp_path) -> Path:
    return shutil.copytree(kept, tmp_path / "tiny")


def test_a_run_is_verified_by_its_own_defense_again_and_again(run, finished) -> None:
    for number in (1, 2):
        status, printed, _ = run("verify", finished, "--replicates", 2)
        assert status == 0
        assert "newly broken" in printed
        assert "by the same weights" in printed
        assert (finished / f"verification-{number}.csv").exists()
    first, second = (
        (finished / f"verification-{n}.toml").read_text(encoding="utf-8") for n in (1, 2)
    )
    assert first != second  # other draws


def test_saved_images_are_judged_by_another_defense(run, finished, tiny_defense) -> None:
    status, printed, _ = run("verify", finished, "--defense", tiny_defense, "--replicates", 2)
    assert status == 0
    assert "newly broken" in printed
    status, _, err = run("verify", finished, "--defense", "fashion-mnist")
    assert status == 2
    assert "cannot take images of shape (1, 8, 8)" in err


def test_a_defense_that_has_changed_since_is_not_taken_for_the_runs(run, finished) -> None:
    command = finished / "command.toml"
    command.write_text(f'purifier = "none"\n{command.read_text()}')
    status, _, err = run("verify", finished)
    assert status == 2
    assert "other weights" in err


def test_runs_are_compared(run, finished, kept, tmp_path) -> None:
    out = tmp_path / "compared"
    status, printed, _ = run("compare", finished, kept, "--names", "a", "b", "--out", out)
    assert status == 0
    assert "McNemar" in printed
    assert set(pd.read_csv(out / "comparison.csv")["defense"]) == {"a", "b"}
    assert run("compare", finished, kept)[0] == 2  # both are called tiny
    assert run("compare", finished, kept, "--names", "a")[0] == 2
    assert run("compare", tmp_path / "nothing")[0] == 2


def test_a_page_is_written(run, finished, tiny_defense) -> None:
    assert run("report", finished)[0] == 0
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "data:image/png" in page
    again = ("--defense", tiny_defense, "--out", finished / "again.html", "--name", "mine")
    assert run("report", finished, *again)[0] == 0
    assert "mine" in (finished / "again.html").read_text(encoding="utf-8")


def test_a_run_s_own_defense_that_answers_differently_is_not_its_judge(run, tmp_path) -> None:
    code = tmp_path / "odd_model.py"
    code.write_text(
        "from torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def forward(self, x): return x.flatten(1)[:, :10] * FACTOR\n"
        "FACTOR = 1.0\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        odd = ("--classifier", "odd_model:Odd", "--purifier", "jpeg:75", "--data", "digits")
        small = ("--images", 2, "--steps", 1, "--replicates", 1, "--judge-replicates", 16)
        assert run("evaluate", *odd, *small, "--out", tmp_path / "run")[0] == 0
        assert run("verify", tmp_path / "run")[0] == 0
        sys.modules["odd_model"].FACTOR = -1.0
        status, _, err = run("verify", tmp_path / "run")
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("odd_model", None)
    assert status == 2
    assert "the classifier that command.toml names answers differently" in err


def test_a_shard_that_leaves_no_images_is_refused(run, tiny_defense, tmp_path) -> None:
    status, _, err = run(*words(tiny_defense, tmp_path / "part", "--shard", "2/2"))
    assert status == 2
    assert "fewer" in err


def test_the_only_part_is_merged(run, kept, tiny_defense, tmp_path) -> None:
    assert run(*words(tiny_defense, tmp_path / "part", "--shard", "1/2"))[0] == 0
    assert run("merge", tmp_path / "part", "--out", tmp_path / "whole")[0] == 0
    for name in ("records.csv", "adversarial.safetensors", "table.md"):
        assert (tmp_path / "whole" / name).read_bytes() == (kept / name).read_bytes()


def test_processes_that_share_a_run_must_be_told_where(run, tiny_defense, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = run("evaluate", "--defense", tiny_defense, *SMALL)
    assert status == 2
    assert "--out" in err


# Sweeps.


def test_a_sweep_runs_its_grid_and_compares_it(run, tiny_defense, tmp_path) -> None:
    sweep = ("--sweep", "eps=0.05,0.1", "--sweep", "langevin-steps=1,2")
    out = tmp_path / "sweep"
    status, printed, _ = run(*words(tiny_defense, out, *sweep))
    assert status == 0
    points = {p.name for p in out.iterdir() if p.is_dir()}
    assert points == {f"eps={e}, langevin-steps={k}" for e in (0.05, 0.1) for k in (1, 2)}
    table = pd.read_csv(out / "comparison.csv")
    assert set(table["settings"]) == points
    for figure in ("accuracy-over-eps", "accuracy-over-langevin-steps"):
        assert (out / f"{figure}.svg").exists()
    assert "as each row says" in printed


def test_a_grid_is_the_product_of_its_axes() -> None:
    found = grid(("eps=0.02,0.1", "steps=0,50", "judge-replicates=7"), Evaluate)
    assert found["eps=0.02, steps=50, judge-replicates=7"] == {
        "eps": 0.02,
        "steps": 50,
        "judge_replicates": 7,
    }
    assert len(found) == 4
    assert isinstance(found["eps=0.1, steps=0, judge-replicates=7"]["steps"], int)


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("eps", "OPTION=VALUE"),
        ("magic=1", "one of"),
        ("data=1,2", "one of"),
        ("steps=1.5", "whole numbers"),
        ("eps=a", "numbers"),
        ("eps=", "numbers"),
        ("eps=0.1,0.1", "twice"),
    ],
)
def test_a_sweep_of_nothing_is_refused(sweep: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grid((sweep,), Evaluate)


def test_an_option_is_swept_once() -> None:
    with pytest.raises(UsageError, match="twice"):
        grid(("eps=0.1", "eps=0.2"), Evaluate)
