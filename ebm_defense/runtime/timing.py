"""Times and memory of competitors that take turns in one process.

Whatever else the machine does falls on each alike; of each the lower quartile of its times counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    competitors: Mapping[str, Callable[[], object]],
    seconds: float,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Run competitors in turn for about `seconds` each and return each one's lower quartile.

    Args:
        competitors: by name; each is run once before it is timed.
        seconds: of the wall clock, for each competitor.
        device: waited for before a clock is read.
        clock: seconds; a CPU clock on a busy machine, with one thread.
    """
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for run in competitors.values():
        run()
    end = time.perf_counter() + seconds * len(competitors)
    while time.perf_counter() < end or not all(times.values()):
        for name, run in competitors.items():
            times[name].append(timed(run, device, clock))
    return {name: sorted(t)[len(t) // 4] for name, t in times.items()}


def timed(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Return the seconds that one run takes, until the device is done with it."""
    _wait(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Return the most bytes held while running: by torch on a GPU, by the process on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return int(torch.cuda.max_memory_allocated(device))
    if not sys.platform.startswith("linux"):
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
        run()
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
