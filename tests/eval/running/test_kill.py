"""A run killed at any instant, and repeated, ends as one that was never interrupted."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ebm_defense import UsageError

KILLS = 20
FOLDERS = 4  # each killed again and again, until all kills are spent


@pytest.fixture
def whole(small, children, tmp_path) -> Path:
    assert children.do(lambda: small.run(tmp_path / "whole")) == 0
    return tmp_path / "whole"


def half_written(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob(".*") if not p.name.startswith(".lock")]


def test_killed_at_random_instants_a_run_ends_as_if_it_never_was(
    small, children, whole, same_run, tmp_path
):
    begun = time.perf_counter()
    assert children.do(lambda: small.run(tmp_path / "timed")) == 0
    duration, instants = time.perf_counter() - begun, random.Random(0)
    statuses = []
    for number in range(FOLDERS):
        out = tmp_path / f"killed {number}"
        for _ in range(KILLS // FOLDERS):
            child = children.start(lambda out=out: small.run(out))
            time.sleep(instants.uniform(0.0, 0.6 * duration))
            statuses.append(children.end(child, signal.SIGKILL))
        assert children.do(lambda out=out: small.run(out)) == 0
        same_run(out, whole)
        assert not half_written(out)
    # On a busy machine the timed run was slow, and some instants lie after a run's end.
    assert -signal.SIGKILL in statuses


def kill_at_write(number: int, before: bool):
    """Make this process die just before or after its file of this number takes its name."""
    rename, count = Path.replace, iter(range(1000))

    def replace(self: Path, target: Path) -> Path:
        last = next(count) == number
        if not (last and before):
            rename(self, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return target

    Path.replace = replace


def test_killed_at_any_of_its_writes_a_run_ends_as_if_it_never_was(
    small, children, whole, same_run, tmp_path
):
    writes, killed = 0, True
    while killed:
        out = tmp_path / f"write {writes}"

        def die(out: Path = out, number: int = writes) -> None:
            kill_at_write(number, before=number % 2 == 0)
            small.run(out)

        killed = children.do(die) == -signal.SIGKILL
        assert children.do(lambda out=out: small.run(out)) == 0
        same_run(out, whole)
        assert not half_written(out)
        writes += 1
    assert writes > 3 * 4 + 8  # four files a shard, and the folder's own


class Dazzled(nn.Module):
    """A classifier that returns NaN on bright images, until it is healed."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.healed = inner, False

    def forward(self, x):
        bright = x.flatten(1).mean(1, keepdim=True) > 0.8
        return torch.where(bright & (not self.healed), torch.nan, self.inner(x))


def test_a_run_that_meets_nan_names_the_image_and_keeps_what_was_done(small, same_run, tmp_path):
    small.images[4] = 1.0
    defense = small.defense(steps=2, replicates=2)
    defense.classifier = Dazzled(defense.classifier)
    with pytest.raises(UsageError, match="NaN or infinite logits for image 4"):
        small.run(tmp_path / "run", defense=defense)
    sealed = sorted((tmp_path / "run" / "shards").glob("*.sha256"))
    assert [p.stem for p in sealed] == ["000000", "000002"]
    before = [p.stat().st_mtime_ns for p in sealed]
    defense.classifier.healed = True
    for name in ("run", "whole"):
        small.run(tmp_path / name, defense=defense)
    assert [p.stat().st_mtime_ns for p in sealed] == before
    same_run(tmp_path / "run", tmp_path / "whole")
