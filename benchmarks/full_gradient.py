"""What the full gradient costs: its peak memory and its time against the forward chain's.

    python benchmarks/full_gradient.py                             # minutes on a CPU
    python benchmarks/full_gradient.py --batch 640 --device cuda   # 32 images of 20 replicates
    python benchmarks/full_gradient.py --layouts cifar10-smooth --batch 640 --steps 20

For the published CIFAR-10 energy and the Fashion-MNIST one, with smooth activations and chains in
fp32, it prints the peak of the memory, and by how much that is above the forward chain's alone,
beside the size of the states that are kept: it grows with the number of steps K as they do. On a
CPU it is the whole process's, torch and all. `ratio` is the time of forward chain and way back,
over that of the forward chain. Times are the processor's own on a CPU, so that they do not count
other programs'.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from common import Options, Result, main, table

from ebm_defense import ConvEnergy, UsageError
from ebm_defense.attacks import Full
from ebm_defense.energies.conv import channels_last
from ebm_defense.eval.speed.roofline import LAYOUTS
from ebm_defense.eval.speed.throughput import forward_chain, gradient_through, start_of
from ebm_defense.runtime.memory import keep_freed_memory
from ebm_defense.runtime.timing import CLOCKS, peak_memory, timed

SMOOTH = ("cifar10-smooth", "fashion-mnist-16-smooth")
MIB = 2**20
WARM = 5


class Case(NamedTuple):
    """One measurement, in a process of its own."""

    layout: str
    steps: int
    store: str
    batch: int
    max_chains: int
    device: str
    precision: str


def measure(case: Case) -> dict[str, str | int]:
    """Run forward chain and full gradient once each, and return the table's line."""
    keep_freed_memory()
    settings, device = LAYOUTS[case.layout], torch.device(case.device)
    clock = CLOCKS["cpu" if case.device == "cpu" else "wall"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = channels_last(ConvEnergy(settings).requires_grad_(False)).to(device)
    gradient = Full(store=case.store, precision=case.precision)
    short = start_of(settings, case.batch, WARM, device)
    forward_chain(energy, short, case.precision)()  # what happens only once is not in the times
    start = start_of(settings, case.batch, case.steps, device)
    seconds: list[float] = []
    peaks: list[int] = []
    for run in (
        forward_chain(energy, start, case.precision),
        gradient_through(energy, start, case.precision, gradient, case.max_chains),
    ):
        peak = peak_memory(lambda run=run: seconds.append(timed(run, device, clock)), device)
        peaks.append(peak or 0)
    kept = case.steps if case.store == "all" else math.isqrt(case.steps)
    return {
        "energy": case.layout,
        "K": case.steps,
        "store": case.store,
        "states MiB": f"{kept * start.x.numel() * start.x.element_size() / MIB:.1f}",
        "above the chain MiB": f"{(peaks[1] - peaks[0]) / MIB:.1f}",
        "peak MiB": f"{peaks[1] / MIB:,.0f}",
        "ms a chain-step": f"{1e3 * seconds[0] / case.steps / case.batch:.2f}",
        "ratio": f"{seconds[1] / seconds[0]:.2f}",
    }


@dataclass(frozen=True, kw_only=True)
class FullGradient(Options):
    """Measure what the full gradient costs: peak memory, and time against the forward chain's."""

    layouts: tuple[str, ...] = SMOOTH
    """Energies."""
    steps: tuple[int, ...] = (100, 500, 1500)
    """Langevin steps K."""
    stores: tuple[str, ...] = ("all", "checkpoints")
    """Which states are kept."""
    batch: int = 8
    """Chains."""
    max_chains: int = 400
    """Chains that run at a time."""
    precision: str = "fp32"
    """Of chain and products."""
    device: str = "cpu"
    """Where to compute."""

    def run(self) -> Result:
        """Measure each case in a fresh process."""
        if unknown := sorted({*self.layouts} - {*SMOOTH}):
            raise UsageError(f"unknown layout {unknown[0]!r}; choose among {', '.join(SMOOTH)}.")
        cases = self._cases()
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
            text = table(pool.map(measure, cases))
        usual = (self.batch, self.device) == (8, "cpu")
        name = "full-gradient" if usual else f"full-gradient-{self.device}-{self.batch}"
        return Result(name, f"{text}\n\n{self.batch} chains.", sum(c.steps for c in cases))

    def _cases(self) -> list[Case]:
        return [
            Case(layout, k, store, self.batch, self.max_chains, self.device, self.precision)
            for layout in self.layouts
            for k in self.steps
            for store in self.stores
        ]


if __name__ == "__main__":
    sys.exit(main(FullGradient))
