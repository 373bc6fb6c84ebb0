"""What the full gradient costs: its peak memory and its time against the forward chain's.

    python benchmarks/full_gradient.py                             # minutes on a CPU
    python benchmarks/full_gradient.py --batch 640 --device cuda   # 32 images of 20 replicates

For the published CIFAR-10 energy and the Fashion-MNIST one, with smooth activations and chains in
fp32, it prints the peak of the memory above that of the forward chain alone, beside the size of the
states that are kept: the one grows with the number of steps K as the other does. `ratio` is the
time of forward chain and way back, over that of the forward chain. Times are the processor's own
on a CPU, so that they do not count other programs'.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pandas as pd
import torch

from ebm_defense import ConvEnergy, ConvEnergySettings, LangevinPurifier, PurifiedClassifier
from ebm_defense.attacks import Full
from ebm_defense.energies import channels_last
from ebm_defense.memory import keep_freed_memory
from ebm_defense.noise import KeyedNoise, chain_keys

LAYOUTS = {
    "cifar10": ConvEnergySettings(activation="soft_lrelu"),
    "fashion-mnist": ConvEnergySettings(
        channels=1, image_size=28, width=16, activation="soft_lrelu"
    ),
}
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
    shape = LAYOUTS[case.layout]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        energy = channels_last(ConvEnergy(shape).requires_grad_(False))
    purifier = LangevinPurifier(energy, case.steps, precision=case.precision)
    defense = PurifiedClassifier(torch.nn.Flatten(), purifier, max_chains=case.max_chains)
    defense.to(case.device)
    size = shape.image_size
    images = torch.full((case.batch, shape.channels, size, size), 0.5, device=case.device)
    keys = chain_keys(0, "benchmark", range(case.batch), range(1))
    gradient = Full(store=case.store, precision=case.precision)
    with torch.no_grad():
        warm_up(purifier, images)
        forward = clock(lambda: defense.purify_replicates(images, keys), case.device)
        before = peak(case.device)
        full = clock(lambda: gradient.purify(defense, images, keys).pull(images[None]), case.device)
    kept = case.steps if case.store == "all" else math.isqrt(case.steps)
    return {
        "energy": case.layout,
        "K": case.steps,
        "store": case.store,
        "states MiB": f"{kept * images.numel() * images.element_size() / MIB:.1f}",
        "peak MiB": f"{(peak(case.device) - before) / MIB:.1f}",
        "ms a chain-step": f"{1e3 * forward / case.steps / case.batch:.2f}",
        "ratio": f"{full / forward:.2f}",
    }


def warm_up(purifier: LangevinPurifier, images: torch.Tensor) -> None:
    """Take a few steps, so that what happens only once is not in the times."""
    noise = KeyedNoise(torch.arange(len(images), device=images.device))
    purifier.advance(purifier.enter(images), noise, range(WARM))


def clock(work: Callable[[], object], device: str) -> float:
    """Return the seconds that work takes."""
    if device == "cpu":
        begun = time.process_time()
        work()
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def peak(device: str) -> int:
    """Return the most bytes that were held so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Measure each case in a fresh process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 500, 1500])
    parser.add_argument("--stores", nargs="*", default=["all", "checkpoints"])
    parser.add_argument("--batch", type=int, default=8, help="chains")
    parser.add_argument("--max-chains", type=int, default=400)
    parser.add_argument("--precision", default="fp32", help="of chain and products")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    cases = [
        Case(layout, k, store, given.batch, given.max_chains, given.device, given.precision)
        for layout in given.layouts
        for k in given.steps
        for store in given.stores
    ]
    lines = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for line in pool.map(measure, cases):
            lines.append(line)
            print(*line.values(), sep=" | ", flush=True)
    print(f"\n{pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
