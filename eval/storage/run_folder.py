"""A run on disk, which outlives whatever happens to the processes that make it."""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import tomli_w
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.eval.running.workers import ALONE, POLL, LostWorkerError, Watch, Workers, hold
from ebm_defense.eval.storage.behaviour import Answers, refuse_another
from ebm_defense.eval.storage.settings import Shard, environment
from ebm_defense.storage.files import load_tensors, save_tensors, writable_folder, write_text
from ebm_defense.storage.folders import sha256

SETTINGS, DATA, ENVIRONMENT, RECORDS = (
    "settings.toml",
    "data.safetensors",
    "environment.toml",
    "records.csv",
)
ADVERSARIAL, SUMS = "adversarial.safetensors", "SHA256SUMS"
SEALED = (SETTINGS, DATA, RECORDS, ADVERSARIAL)
SHARDS = "shards"
BEHAVIOUR = "behaviour.safetensors"
OWN_TEMPORARY = re.compile(r"\.(lock-\d+|.+\.\d+(\.\w+)?)")

Costs = dict[str, dict[str, float]]
"""Chain-steps and seconds, each by phase."""


class Done(NamedTuple):
    """A finished shard and what it cost."""

    shard: Shard
    costs: Costs


class MemoryStore:
    """Finished shards in memory, for a run that keeps nothing."""

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self.settings = settings or {}
        self._done: dict[int, Done] = {}

    @contextmanager
    def claimed(self) -> Iterator[MemoryStore]:
        """Do nothing: nobody else works here."""
        yield self

    def load(self, start: int) -> Done | None:
        """Return the shard that begins with image `start`, or None if it is not finished."""
        return self._done.get(start)

    def save(self, start: int, done: Done) -> None:
        """Keep a finished shard."""
        self._done[start] = done

    def wait(self, starts: Sequence[int], workers: Workers) -> None:
        """Wait until the other processes have done their shards; here there are none."""


class RunFolder:
    """A run on disk: settings, images, four files a finished shard, and at the end the whole.

    Args:
        path: the folder, made if it is not there.
        settings: from `settings_of`; of a part of a run, with "shard".
        data: the run's images and labels, which make the folder complete in itself.
        workers: who shares the folder.
        behaviour: the answers of the model at hand, from `behaviour`; None where there is none.

    Raises:
        UsageError: the folder cannot be written, or holds a run of other settings.
    """

    def __init__(
        self,
        path: str | Path,
        settings: dict[str, Any],
        data: dict[str, Tensor],
        workers: Workers = ALONE,
        behaviour: Answers | None = None,
    ) -> None:
        self.settings, self.data, self.workers = settings, data, workers
        self.behaviour = behaviour
        refuse_foreign(Path(path).expanduser())
        self.path = writable_folder(path)
        self.shards = self.path / SHARDS

    @contextmanager
    def claimed(self) -> Iterator[RunFolder]:
        """Keep other processes out while this one works here.

        Raises:
            UsageError: another process works here, or the folder holds a run of other settings, or
                of a model that behaves differently.
        """
        with hold(self._lock(self.workers.rank)):
            self._claim()
            yield self

    def _claim(self) -> None:
        file = self.path / SETTINGS
        if not file.exists():
            refuse_foreign(self.path)
            write_text(file, tomli_w.dumps(self.settings))
        elif differing := differences(read_toml(file), self.settings):
            raise UsageError(
                f"{self.path} holds a run of other settings ({', '.join(differing)}); "
                "name another folder, or repeat that run's command to resume it."
            )
        self._compare()
        if self.workers.leads and not (self.path / DATA).exists():
            save_tensors(self.path / DATA, self.data)
        writable_folder(self.shards)

    def _compare(self) -> None:
        """Keep how the model behaves, or compare it with the model that began the run."""
        file = self.path / BEHAVIOUR
        if self.behaviour is None:
            return
        if file.exists():
            refuse_another(load_tensors(file), self.behaviour, self.path)
        else:  # a new run, or one of before this was kept
            save_tensors(file, self.behaviour)

    def _lock(self, rank: int) -> Path:
        return self.path / f".lock-{rank}"

    def load(self, start: int) -> Done | None:
        """Return the shard that begins with image `start`, or None if it is not finished.

        Raises:
            UsageError: a file of it is missing or was changed.
        """
        return load_shard(self.shards, start)

    def save(self, start: int, done: Done) -> None:
        """Keep a finished shard."""
        records, images, costs, sums = shard_files(self.shards, start)
        save_tensors(images, done.shard[1])
        write_text(records, done.shard[0].to_csv(index=False))
        write_text(costs, tomli_w.dumps(done.costs))
        # Written last: it vouches for the others, and without it the shard is not finished.
        write_text(sums, _seal((records, images, costs)))

    def wait(self, starts: Sequence[int], workers: Workers) -> None:
        """Wait until the other processes have done their shards.

        Raises:
            LostWorkerError: one of them died, or none came within a minute.
        """
        others = {r: self._lock(r) for r in range(workers.world) if r != workers.rank}
        watch = Watch(others)
        while awaited := self._unfinished(starts, workers):
            # A process may seal its last shard and end between the two questions, so ask again.
            if watch.lost(awaited) and (gone := watch.lost(self._unfinished(starts, workers))):
                ranks = ", ".join(map(str, sorted(gone)))
                raise LostWorkerError(
                    f"process {ranks} of this run ended before its shards were done; nothing is "
                    "lost: the same command goes on from the last finished shard."
                )
            time.sleep(POLL)

    def _unfinished(self, starts: Sequence[int], workers: Workers) -> set[int]:
        return {
            rank
            for rank in range(workers.world)
            if rank != workers.rank
            and any(not self._is_sealed(s) for s in workers.of_rank(starts, rank))
        }

    def _is_sealed(self, start: int) -> bool:
        return shard_files(self.shards, start)[-1].exists()

    def finish(self, shard: Shard, costs: Costs, parts: Iterable[dict[str, Any]] = ()) -> None:
        """Write the whole run's records, adversarial images, environment, and their hashes.

        Args:
            shard: the records and images of all shards.
            costs: of all shards.
            parts: the environments of the parts that were merged, if any.
        """
        write_text(self.path / RECORDS, shard[0].to_csv(index=False))
        save_tensors(self.path / ADVERSARIAL, shard[1])
        where = environment() | {"run": costs, "parts": list(parts)}
        write_text(self.path / ENVIRONMENT, tomli_w.dumps(where))
        lines = [f"{sha256(self.path / name)}  {name}\n" for name in SEALED]
        write_text(self.path / SUMS, "".join(lines))
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for place in (self.path, self.shards):
            for file in place.iterdir():
                if OWN_TEMPORARY.fullmatch(file.name) and not file.name.startswith(".lock"):
                    file.unlink(missing_ok=True)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder with files in it that no run made; what a killed run left is no obstacle.

    Raises:
        UsageError: there are such files, and no settings of a run beside them.
    """
    if not path.is_dir() or (path / SETTINGS).exists():
        return
    foreign = [p for p in path.iterdir() if not OWN_TEMPORARY.fullmatch(p.name)]
    if foreign and not (path / SETTINGS).exists():  # another process may have begun just now
        raise UsageError(f"{path} is not empty and holds no run of ours; name another folder.")


def kept_answers(folder: Path) -> Answers | None:
    """Return how the model of a run answers; None where nobody kept it."""
    file = folder / BEHAVIOUR
    return load_tensors(file) if file.exists() else None


def shard_files(folder: Path, start: int) -> tuple[Path, Path, Path, Path]:
    """Return the files of one shard: records, adversarial images, costs, and the hashes of them."""
    names = [f"{start:06d}.{suffix}" for suffix in ("csv", "safetensors", "toml", "sha256")]
    records, images, costs, sums = (folder / name for name in names)
    return records, images, costs, sums


def load_shard(folder: Path, start: int) -> Done | None:
    """Return the shard that begins with image `start`, or None if it is not finished.

    Raises:
        UsageError: a file of it is missing or was changed.
    """
    *files, sums = shard_files(folder, start)
    if not sums.exists():
        return None
    said = dict(enumerate(sums.read_text(encoding="utf-8", errors="replace").split()))
    for i, file in enumerate(files):
        if not file.exists() or sha256(file) != said.get(i):
            raise UsageError(
                f"{file} is damaged or was changed; delete {sums} to run that shard again."
            )
    records, images, costs = files
    return Done((read_records(records), load_tensors(images)), read_toml(costs))


def _seal(files: Sequence[Path]) -> str:
    return " ".join(map(sha256, files)) + "\n"


def read_records(file: Path) -> pd.DataFrame:
    """Read records as they were written, to the last digit."""
    # pandas' other engine is fast and, before version 4, off by an ulp now and then.
    return pd.read_csv(file, engine="python")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a run's TOML file.

    Raises:
        UsageError: it is damaged.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}); name another folder.") from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted names under which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in sorted({*old, *new})
            for name in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [n for i, (a, b) in pairs for n in differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]


def total(costs: Iterable[Costs]) -> Costs:
    """Add costs up, phase by phase."""
    summed: Costs = {"steps": {}, "seconds": {}}
    for one in costs:
        for what, phases in summed.items():
            for phase, cost in one.get(what, {}).items():
                phases[phase] = phases.get(phase, 0) + cost
    return summed
