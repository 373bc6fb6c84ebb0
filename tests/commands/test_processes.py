"""One run by one process, by torchrun's two, and by two parts merged: the same to the last byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from ebm_defense.commands.main import main

MODULE = "ebm_defense.commands.main"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", MODULE)
# Two shards of 32 images; at this eps some of the few images that are right fall and some stand.
SMALL = {"data": "digits", "images": 64, "eps": 0.3, "steps": 2, "replicates": 2}
OWN = {"environment.toml", "command.toml"}  # seconds and versions; the folder that was named


def evaluate(defense: Path, out: Path, *more: str) -> list[str]:
    settings = SMALL | {"judge-replicates": 3, "defense": defense, "out": out}
    return ["evaluate", *(w for k, v in settings.items() for w in (f"--{k}", str(v))), *more]


@pytest.fixture(scope="module")
def one_thread():
    """As many threads as torchrun gives each process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tiny_defense, tmp_path_factory, one_thread) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(evaluate(tiny_defense, out)) == 0
    return out


def contents(run: Path) -> dict[str, bytes]:
    """Return what the files of a finished run hold, but for what may differ."""
    kept = (p for p in run.iterdir() if p.is_file() and not p.name.startswith(".lock"))
    return {p.name: p.read_bytes() for p in kept if p.name not in OWN}


def test_the_run_has_something_to_tell(alone):
    records = pd.read_csv(alone / "records.csv")
    attacked = records[records["clean"] == 1]
    assert set(attacked["0 PGD-2: stands"]) == {0, 1}
    assert set(attacked["image"] // 32) == {0, 1}


def test_torchruns_processes_make_the_run_of_one(alone, tiny_defense, tmp_path):
    out = tmp_path / "run"
    words = [*TORCHRUN, *evaluate(tiny_defense, out)]
    folders = os.pathsep.join(filter(None, sys.path))
    there = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    done = subprocess.run(
        words, env=there, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    assert done.stdout.count("Everything was saved in") == 1  # the first process alone says so
    assert {p.name for p in out.glob(".lock-*")} == {".lock-0", ".lock-1"}  # both were at it
    assert contents(out) == contents(alone)


def test_merged_parts_make_the_run_of_one(alone, tiny_defense, tmp_path, capsys):
    parts = [str(tmp_path / name) for name in ("part 1", "part 2")]
    for number, part in enumerate(parts, 1):
        assert main(evaluate(tiny_defense, Path(part), "--shard", f"{number}/2")) == 0
    assert main(["merge", *parts, "--out", str(tmp_path / "whole")]) == 0
    merged, whole = contents(tmp_path / "whole"), contents(alone)
    assert merged == {name: whole[name] for name in merged}
    assert set(whole) - set(merged) == {"purification.png"}
