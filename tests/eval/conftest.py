"""Small runs, in this process and in others."""

from __future__ import annotations

import importlib
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.eval import Report, evaluate

SAME = ("records.csv", "adversarial.safetensors", "data.safetensors", "settings.toml")
TABLES = ("table.txt", "table.md", "table.tex", "table.csv")
ATTACK = PGD(threat=ThreatModel(eps=0.1), steps=2, step_size=0.05, replicates=2)
COUNT = 5


class Children:
    """Runs in forked processes, which spare themselves the long import of torch."""

    def __init__(self) -> None:
        self.alive: set[int] = set()

    def start(self, work: Callable[[], object]) -> int:
        """Begin some work in a child; its exit status is 0 if nothing was raised."""
        assert threading.active_count() == 1, "what a thread locks stays locked in a child"
        with warnings.catch_warnings():
            # Python warns of OpenMP's threads, which the child does not have; it asks for none.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid:
            self.alive.add(pid)
            return pid
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def end(self, pid: int, signal: int | None = None) -> int:
        """Wait for a child, killed first if a signal is given; return its exit status."""
        if signal is not None:
            os.kill(pid, signal)
        self.alive.discard(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def do(self, work: Callable[[], object]) -> int:
        return self.end(self.start(work))


@pytest.fixture
def children():
    """Processes of this test, none of which outlives it."""
    started = Children()
    yield started
    for pid in list(started.alive):
        started.end(pid, signal=9)


class Small(NamedTuple):
    """A run of five images in three shards, which takes a moment."""

    defense: Callable[..., object]
    images: torch.Tensor
    labels: torch.Tensor

    def run(self, out: Path | None, defense: object = None, **options) -> Report:
        chosen = {"attacks": [ATTACK], "judge_replicates": 4} | options
        model = self.defense(steps=2, replicates=2) if defense is None else defense
        return evaluate(model, self.images, self.labels, out=out, **chosen)


@pytest.fixture
def small(langevin_defense, monkeypatch) -> Small:
    for name in ("running.runner", "merge"):
        monkeypatch.setattr(importlib.import_module(f"ebm_defense.eval.{name}"), "SHARD", 2)
    runner = importlib.import_module("ebm_defense.eval.running.runner")
    monkeypatch.setattr(runner, "shards_at_once", lambda job: 1)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand((COUNT, 1, 8, 8), generator=generator, dtype=torch.float64)
    labels = langevin_defense(replicates=50)(images).argmax(1)
    labels[-1] = (labels[-1] + 1) % 3
    return Small(langevin_defense, images, labels)


@pytest.fixture
def same_run():
    """Tell whether two folders hold the same records, images and tables, to the last byte."""

    def compare(first: Path, second: Path) -> None:
        for name in (*SAME, *TABLES, "SHA256SUMS"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

    return compare
