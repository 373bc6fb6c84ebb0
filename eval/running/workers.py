"""Several processes at one run: who does which shards, and who is still alive."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.interface.numbers import plain_numbers

PATIENCE = 60.0  # seconds that a process may take to start before the others give it up
POLL = 0.2


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Which shards a process does, in turn with the others.

    Attributes:
        part, parts: this folder holds part 1 … `parts` of the run (`--shard part/parts`), to be
            merged later.
        rank, world: this process is number 0 … `world` − 1 of those that share the folder.

    Raises:
        UsageError: a number out of range.
    """

    part: int = 1
    parts: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        plain_numbers(self)
        if not 1 <= self.part <= self.parts:
            raise UsageError(f"a shard is 1/n to n/n, not {self.part}/{self.parts}.")
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"RANK must be from 0 to WORLD_SIZE − 1, not {self.rank} of {self.world}."
            )

    @classmethod
    def of(cls, shard: str = "1/1", environment: Mapping[str, str] = os.environ) -> Workers:
        """Read `--shard i/n` and the RANK and WORLD_SIZE that torchrun sets."""
        rank, world = (environment.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        part, _, parts = shard.partition("/")
        try:
            return cls(part=int(part), parts=int(parts), rank=int(rank or 0), world=int(world or 1))
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"a shard has the form 1/2, not {shard!r}; RANK and WORLD_SIZE are whole numbers, "
                f"not {rank!r} and {world!r}."
            ) from error

    @property
    def leads(self) -> bool:
        """Whether this process writes the end of the run."""
        return self.rank == 0

    def in_folder(self, starts: Sequence[int]) -> Sequence[int]:
        """Return the shards that this folder holds in the end."""
        return starts[self.part - 1 :: self.parts]

    def of_rank(self, starts: Sequence[int], rank: int | None = None) -> Sequence[int]:
        """Return which of a folder's shards one process does: this one if `rank` is not given."""
        return starts[self.rank if rank is None else rank :: self.world]


ALONE = Workers()


class LostWorkerError(FailedRunError):
    """Another process of this run ended before its shards were done."""


@contextmanager
def hold(file: Path) -> Iterator[None]:
    """Hold a file's lock for this process, whose name is written into it.

    The kernel takes the lock back when the process dies, however it dies, so none is ever stale.

    Raises:
        UsageError: another process holds it.
    """
    with file.open("a+", encoding="utf-8") as handle:
        if not _lock(handle, tries=5):
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise UsageError(
                f"{file.parent} is in use by {owner}; wait until it has ended, or name another "
                "folder."
            )
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def is_held(file: Path) -> bool:
    """Tell whether another process holds a file's lock."""
    if not file.exists():
        return False
    with file.open("a+", encoding="utf-8") as handle:
        return not _lock(handle)


def _lock(handle: IO[str], tries: int = 1) -> bool:
    # POSIX record locks, not flock: they also hold over NFS and do not pass to forked children.
    import fcntl

    for again in range(tries):
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # A process that only asks whether the lock is held takes it for an instant.
            time.sleep(POLL / 4 if again + 1 < tries else 0.0)
        else:
            return True
    return False


class Watch:
    """Tells by their locks which of the other processes have died.

    Args:
        locks: each other process's lock file, by rank.
    """

    def __init__(self, locks: Mapping[int, Path]) -> None:
        self.locks, self.begun = locks, time.monotonic()
        self.seen: set[int] = set()

    def lost(self, awaited: set[int]) -> set[int]:
        """Return those of the awaited ranks that were here and are gone, or never came."""
        held = {rank for rank in awaited if is_held(self.locks[rank])}
        self.seen |= held
        late = time.monotonic() - self.begun > PATIENCE
        return {rank for rank in awaited - held if late or rank in self.seen}
