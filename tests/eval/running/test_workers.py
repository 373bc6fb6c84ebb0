"""Several processes, several machines, a full memory: the records are the same."""

from __future__ import annotations

import importlib
import signal
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from ebm_defense import UsageError
from ebm_defense.eval.merge import merge
from ebm_defense.eval.running.workers import LostWorkerError, Workers, hold, is_held

workers_module = importlib.import_module("ebm_defense.eval.running.workers")
runner = importlib.import_module("ebm_defense.eval.running.runner")


# Who does what.


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_shard_is_done_exactly_once(parts, world):
    starts = range(0, 320, 32)
    done = [
        start
        for part in range(1, parts + 1)
        for rank in range(world)
        for w in [Workers(part=part, parts=parts, rank=rank, world=world)]
        for start in w.of_rank(w.in_folder(starts))
    ]
    assert sorted(done) == list(starts)


def test_workers_are_read_from_an_option_and_from_torchruns_environment():
    found = Workers.of("2/3", {"RANK": "1", "WORLD_SIZE": "4"})
    assert found == Workers(part=2, parts=3, rank=1, world=4)
    assert Workers.of("1/1", {}) == Workers()
    assert [Workers(rank=r, world=2).leads for r in (0, 1)] == [True, False]


@pytest.mark.parametrize("shard", ["3/2", "0/2", "2", "a/b", "1/0", ""])
def test_a_shard_out_of_range_is_refused(shard):
    with pytest.raises(UsageError, match="shard"):
        Workers.of(shard, {})


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}])
def test_a_broken_environment_is_refused(environment):
    with pytest.raises(UsageError, match="WORLD_SIZE"):
        Workers.of("1/1", environment)


# Parts of a run, merged.


@pytest.fixture
def parts(small, tmp_path) -> list[Path]:
    folders = [tmp_path / f"part {i}" for i in (1, 2)]
    for i, folder in enumerate(folders, 1):
        small.run(folder, workers=Workers(part=i, parts=2))
    return folders


def test_merged_parts_are_the_uninterrupted_run(small, parts, same_run, tmp_path):
    whole = small.run(tmp_path / "whole")
    merged = merge(parts[::-1], tmp_path / "merged")
    same_run(tmp_path / "whole", tmp_path / "merged")
    assert merged.to_text() == whole.to_text()
    assert merged.chain_steps == whole.chain_steps
    assert torch.equal(merged.originals, whole.originals)


def test_a_part_says_so_and_holds_its_own_shards_alone(small, parts):
    first, second = (tomllib.loads((p / "settings.toml").read_text()) for p in parts)
    assert (first.pop("shard"), second.pop("shard")) == ("1/2", "2/2")
    assert first == second
    assert "Shard 2/2 alone." in (parts[1] / "table.md").read_text()
    assert [p.stem for p in sorted((parts[1] / "shards").glob("*.csv"))] == ["000002"]


def test_a_part_is_not_taken_for_another(small, parts):
    with pytest.raises(UsageError, match="shard"):
        small.run(parts[0], workers=Workers(part=2, parts=2))


def test_a_missing_part_is_named(parts, tmp_path):
    with pytest.raises(UsageError, match="lack shard 000002 of 3"):
        merge(parts[:1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_part_given_twice_is_refused(parts, tmp_path):
    with pytest.raises(UsageError, match="both hold shard 000000"):
        merge([*parts, parts[0]], tmp_path / "merged")


def test_parts_of_different_runs_are_refused_by_name(small, parts, tmp_path):
    other = tmp_path / "other"
    small.run(other, workers=Workers(part=2, parts=2), seed=1)
    with pytest.raises(UsageError, match=r"different runs \(seed\)"):
        merge([parts[0], other], tmp_path / "merged")


def test_a_damaged_part_is_refused(parts, tmp_path):
    file = parts[0] / "shards" / "000004.csv"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UsageError, match=r"000004\.csv is damaged"):
        merge(parts, tmp_path / "merged")


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no run"):
        merge([tmp_path], tmp_path / "merged")


# Processes that share a folder.


def test_two_processes_make_the_run_of_one(small, children, same_run, tmp_path):
    assert children.do(lambda: small.run(tmp_path / "whole")) == 0
    pair = [
        children.start(lambda r=r: small.run(tmp_path / "pair", workers=Workers(rank=r, world=2)))
        for r in (1, 0)
    ]
    assert [children.end(pid) for pid in pair] == [0, 0]
    same_run(tmp_path / "whole", tmp_path / "pair")


def test_a_folder_in_use_is_refused_and_then_free(small, children, tmp_path, monkeypatch):
    run_shard = runner.run_shard
    started = tmp_path / "started"

    def slow(*args):
        started.touch()
        signal.pause()
        return run_shard(*args)

    def work():
        runner.run_shard = slow
        small.run(tmp_path / "run")

    child = children.start(work)
    while not started.exists():
        pass
    with pytest.raises(UsageError, match=f"in use by process {child} on"):
        small.run(tmp_path / "run")
    children.end(child, signal.SIGKILL)
    small.run(tmp_path / "run")


def test_a_process_that_dies_is_noticed_and_nothing_is_lost(
    small, children, same_run, tmp_path, monkeypatch
):
    def die(*args):
        signal.raise_signal(signal.SIGKILL)

    def dying():
        runner.run_shard = die
        small.run(tmp_path / "run", workers=Workers(rank=1, world=2))

    monkeypatch.setattr(workers_module, "PATIENCE", 0.3)
    assert children.do(dying) == -signal.SIGKILL
    with pytest.raises(LostWorkerError, match="process 1 of this run ended"):
        small.run(tmp_path / "run", workers=Workers(rank=0, world=2))
    assert not (tmp_path / "run" / "records.csv").exists()
    small.run(tmp_path / "run")
    small.run(tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


def test_a_lock_is_held_by_the_living_alone(children, tmp_path):
    file, ready = tmp_path / "lock", tmp_path / "ready"

    def work():
        with hold(file):
            ready.touch()
            signal.pause()

    assert not is_held(file)
    child = children.start(work)
    while not ready.exists():
        pass
    assert is_held(file)
    assert f"process {child} on" in file.read_text()
    children.end(child, signal.SIGKILL)
    assert not is_held(file)


# Out of memory.


class Greedy(nn.Module):
    """A classifier that runs out of memory on more than so many images at a time."""

    def __init__(self, inner: nn.Module, most: int) -> None:
        super().__init__()
        self.inner, self.most, self.seen = inner, most, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(x)


def greedy(small, most: int):
    defense = small.defense(steps=2, replicates=2, max_chains=8)
    defense.classifier = Greedy(defense.classifier, most)
    return defense


def test_out_of_memory_the_batch_is_halved_and_the_run_goes_on(small, caplog):
    defense = greedy(small, most=3)
    report = small.run(None, defense=defense)
    said = [r.getMessage() for r in caplog.records if "memory" in r.getMessage()]
    assert [s.split(";")[1].split()[0] for s in dict.fromkeys(said)] == ["4", "2"]
    assert defense.max_chains == 8
    plain = small.run(None)
    assert report.table().equals(plain.table())
    # What was lost to memory is not counted twice, or costs would depend on the machine.
    assert report.chain_steps["PGD-2"] == plain.chain_steps["PGD-2"]


def test_where_not_even_one_chain_fits_one_sentence_says_so(small):
    def work():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(UsageError, match="not hold a single chain") as caught:
        small.defense(max_chains=3).packing.fitting(work)
    assert "2.00 GiB" in str(caught.value)
