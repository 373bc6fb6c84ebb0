"""Run folders that the first release wrote are read, verified, compared and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from ebm_defense import load_data, load_defense
from ebm_defense.commands.main import main
from ebm_defense.eval import evaluate
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.reporting.compare import compare
from ebm_defense.eval.storage.columns import (
    CLEAN,
    CLEAN_VOTES,
    IMAGE,
    LABEL,
    NATURAL,
    UNDEFENDED_ATTACKED,
    UNDEFENDED_CLEAN,
    Kept,
)

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs"
RUNS = ["quick", "hill2021"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "old"))


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_read_with_the_numbers_that_it_stated(name: str) -> None:
    report = load_run(OLD / name)
    found = report.table().set_index(["model", "attack"])["accuracy"] * 100
    assert found["undefended", "APGD-CE-3"] == pytest.approx(57.5)
    assert sorted(round(v, 1) for k, v in found.items() if "BPDA" in k[1]) == [62.5, 87.5]


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_is_verified(copied: Path, name: str) -> None:
    words = ["verify", str(copied / name), "--defense", str(OLD / "defense"), "--seed", "3"]
    assert main(words) == 0


@pytest.mark.parametrize("name", RUNS)
def test_an_old_runs_columns_are_those_that_are_named(name: str) -> None:
    alone = {IMAGE, LABEL, CLEAN, CLEAN_VOTES, NATURAL, UNDEFENDED_CLEAN, UNDEFENDED_ATTACKED}
    for found in set(load_run(OLD / name).records) - alone:
        of, _, what = found.rpartition(": ")
        assert what in set(Kept)
        assert of in {CLEAN, NATURAL, "0 PGD-3", "1 APGD-CE-3"}


def test_old_runs_are_compared() -> None:
    text = compare([load_run(OLD / name) for name in RUNS]).to_text()
    assert "62.5" in text


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_that_was_cut_short_is_resumed(copied: Path, name: str) -> None:
    run = copied / name
    wanted = pd.read_csv(run / "records.csv")
    for file in [*run.glob("shards/000032.*"), run / "SHA256SUMS", run / "records.csv"]:
        file.unlink()
    kept = (run / "shards" / "000000.sha256").stat().st_mtime_ns
    images, labels = load_data("digits", limit=40)
    defense = load_defense(OLD / "defense", precision="fp32", verdict_precision="fp32")
    protocol = load_run(OLD / name).protocol
    evaluate(defense, images, labels, protocol, out=run)
    assert (run / "shards" / "000000.sha256").stat().st_mtime_ns == kept
    found = pd.read_csv(run / "records.csv")
    # Another processor may round a borderline draw to the other side.
    verdicts = ["label", "natural", "0 PGD-3: stands", "1 APGD-CE-3: stands"]
    assert (found[verdicts] == wanted[verdicts]).all(axis=1).sum() >= 38
