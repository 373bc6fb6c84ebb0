"""How many chains run at a time: as many as fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from ebm_defense.engine.cuda_graphs import free_graphs
from ebm_defense.errors import UsageError
from ebm_defense.runtime.memory import is_full

T = TypeVar("T")
Work = Callable[[Tensor, Tensor], object]
"""Purifies the chains of these image rows and keys."""

USUAL, LARGEST, PROBE = 400, 16_384, 64
READY = 4096
"""Chains that are worth having ready for a GPU: one step of so many published ones takes it
milliseconds, by its roofline, and its launches microseconds."""
SHARE = 0.5
"""Of the free memory that chains may take; the rest is the classifier's and the attack's."""

_log = logging.getLogger("ebm_defense")


class Try:
    """One try at some work: as a context, it catches that memory ran out."""

    reason = ""

    def __enter__(self) -> None:
        self.reason = ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if not isinstance(error, RuntimeError | MemoryError) or not is_full(error):
            return False
        self.reason = (str(error).splitlines() or [type(error).__name__])[0]
        return True


class Packing:
    """A number of chains that shrinks when memory runs out.

    Args:
        chains: the number, or None for one that `measure` finds on a GPU; CPU chains are not
            faster beyond a few hundred at a time, and keep 400.
    """

    def __init__(self, chains: int | None) -> None:
        self.chains = USUAL if chains is None else chains
        self.measured = chains is not None

    def aim(self, device: torch.device) -> int:
        """Return how many chains are worth having ready at a time, before or after measuring."""
        if device.type != "cuda":
            return self.chains
        return min(READY, self.chains) if self.measured else READY

    def measure(self, work: Work, keys: Tensor) -> None:
        """Find the number once, from the memory that the first few chains of `keys` `[r, b]` take.

        Their result is thrown away: noise is a function of the keys, so nothing is lost.

        Args:
            work: all that is ever done with so many chains at a time, one after the other.
            keys: of the chains to come.
        """
        if self.measured or keys.device.type != "cuda" or keys.numel() <= self.chains:
            return
        device, few = keys.device, min(PROBE, keys.numel())
        rows = torch.arange(few, device=device) % keys.shape[1]
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work(rows, keys.flatten()[:few])
        taken = max(torch.cuda.max_memory_allocated(device) - before, 1) / few
        self.chains = chains_in(free_memory(device), taken)
        self.measured = True

    def tries(self) -> Iterator[Try]:
        """Yield tries at some work: where memory ran out, one more with half as many chains.

        Raises:
            UsageError: a single chain does not fit.
        """
        attempt = Try()
        yield attempt
        while attempt.reason:
            # Outside the handler, which would keep the failed work's tensors alive.
            self.halve(attempt.reason)
            if torch.cuda.is_available():
                free_graphs()
                torch.cuda.empty_cache()
            yield attempt

    def fitting(self, work: Callable[[], T]) -> T:
        """Do the work in as many `tries` as it takes, and return what it returns."""
        for attempt in self.tries():
            with attempt:
                result = work()
        return result

    def halve(self, reason: str) -> None:
        """Take half as many chains from now on.

        Raises:
            UsageError: it was one already; the reason is what the device said.
        """
        if self.chains == 1:
            raise UsageError(
                f"the device's memory does not hold a single chain ({reason}); free memory, take a "
                "smaller model or --device cpu."
            )
        self.chains //= 2
        _log.warning("out of memory; %d chains run at a time from now on.", self.chains)


def free_memory(device: torch.device) -> int:
    """Return the bytes that torch may still use: the device's free ones, and those it keeps."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def chains_in(free: int, each: float) -> int:
    """Return the largest power of two of chains, each of so many bytes, in a share of the free."""
    fit = max(1, int(SHARE * free / each))
    return int(min(LARGEST, 2 ** (fit.bit_length() - 1)))
