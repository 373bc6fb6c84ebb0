"""How many Langevin steps a second this machine takes, beside the published loop and the roofline.

All competitors run in one process and take turns, so that whatever else the machine does falls on
each alike; of each the lower quartile of its times counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.langevin import LangevinSettings, resolve_precision, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys

LAYOUTS: dict[str, ConvEnergySettings] = {
    "cifar10": ConvEnergySettings(),
    "cifar10-smooth": ConvEnergySettings(activation="soft_lrelu"),
    **{
        f"fashion-mnist-{width}{suffix}": ConvEnergySettings(
            channels=1, image_size=28, width=width, activation=activation
        )
        for width in (16, 32)
        for suffix, activation in (("", "leaky_relu"), ("-smooth", "soft_lrelu"))
    },
}
"""The published CIFAR-10 network, and those of the shipped energies at two widths."""

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
PUBLISHED_EPS = 0.01
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What this machine reaches in one precision: FLOP a second, and bytes a second copied."""

    precision: str
    matmul: float
    convolution: float
    copy: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One competitor's measurement.

    Attributes:
        layout: a name in `LAYOUTS`.
        batch: chains at a time.
        name: "published", or ours by its precision.
        steps_per_second: Langevin steps of one image a second.
        ratio: to the published loop's.
        roofline: share of the bound that ceilings and formulas give (`step_bound`).
        convolution: share of the measured convolution ceiling.
        memory: highest bytes held during it, of the process on a CPU; None where unknown.
    """

    layout: str
    batch: int
    name: str
    steps_per_second: float
    ratio: float
    roofline: float
    convolution: float
    memory: int | None


def step_flops(s: ConvEnergySettings) -> int:
    """Return the FLOP of one step of one image: forward and input gradient of every layer."""
    size, last = s.image_size, s.width * 8 * (s.image_size // 8) ** 2
    products = size**2 * 9 * s.channels * s.width + last
    for i in range(3):
        size //= 2
        products += size**2 * 16 * (s.width * 2**i) * (s.width * 2 ** (i + 1))
    return 4 * products


def step_bytes(s: ConvEnergySettings, itemsize: int) -> int:
    """Return the bytes of one step of one image where only maps between layers leave the chip.

    Each activation is written and read on the way up, read again for its slope, and its gradient
    written and read on the way down; the fp32 state is read and written and its noise read.
    """
    size, inner = s.image_size, s.image_size**2 * s.width
    for i in range(3):
        size //= 2
        inner += size**2 * s.width * 2 ** (i + 1)
    return 5 * itemsize * inner + 3 * 4 * s.channels * s.image_size**2


def step_bound(s: ConvEnergySettings, ceilings: Ceilings) -> float:
    """Return the roofline: the most steps of one image a second that the ceilings allow."""
    compute = step_flops(s) / max(ceilings.convolution, ceilings.matmul)
    traffic = step_bytes(s, BYTES[ceilings.precision]) / ceilings.copy
    return 1.0 / max(compute, traffic)


def published_chain(energy: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Run the chain as the published code does: eager, fp32, NCHW, weights that want gradients."""
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(energy(x).sum(), [x])
        x = x - slope + PUBLISHED_EPS * torch.randn_like(x)
    return x.detach()


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
            times[name].append(_timed(run, device, clock))
    return {name: sorted(t)[len(t) // 4] for name, t in times.items()}


def _timed(run: Callable[[], object], device: torch.device, clock: Clock) -> float:
    _wait(device)
    start = clock()
    run()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceilings(
    precision: str, seconds: float, device: torch.device, clock: Clock = time.perf_counter
) -> Ceilings:
    """Measure what a square matrix product, a dense convolution and a copy reach here."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    big = device.type == "cuda"
    n, batch, count = (8192, 1024, 2**28) if big else (1024, 32, 2**24)
    a = torch.randn(n, n, device=device).to(dtype)
    images = torch.randn(batch, 64, 28, 28, device=device).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(128, 64, 3, 3, device=device).to(dtype)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        t = alternate(
            {
                "matmul": lambda: a @ a,
                "convolution": lambda: F.conv2d(images, kernel, None, 1, 1),
                "copy": lambda: target.copy_(source),
            },
            seconds, device, clock,
        )  # fmt: skip
    products = batch * 28 * 28 * 9 * 64 * 128
    return Ceilings(
        precision=precision,
        matmul=2 * n**3 / t["matmul"],
        convolution=2 * products / t["convolution"],
        copy=2 * 4 * count / t["copy"],
    )


def measure(
    layout: str,
    batch: int,
    ceilings: list[Ceilings],
    seconds: float,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> list[Cell]:
    """Measure the published loop and ours in each ceiling's precision, at one layout and batch."""
    settings = LAYOUTS[layout]
    steps = max(4, min(50, 2000 // batch))
    competitors = _competitors(settings, batch, steps, [c.precision for c in ceilings], device)
    times = alternate(competitors, seconds, device, clock)
    memory = {name: peak_memory(run, device) for name, run in competitors.items()}
    rate = {name: batch * steps / t for name, t in times.items()}
    limits = {"published": ceilings[0]} | {c.precision: c for c in ceilings}
    return [
        Cell(
            layout=layout,
            batch=batch,
            name=name,
            steps_per_second=rate[name],
            ratio=rate[name] / rate["published"],
            roofline=rate[name] / step_bound(settings, limits[name]),
            convolution=rate[name] * step_flops(settings) / limits[name].convolution,
            memory=memory[name],
        )
        for name in competitors
    ]


def _competitors(
    settings: ConvEnergySettings,
    batch: int,
    steps: int,
    precisions: list[str],
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    published = ConvEnergy(settings).to(device)
    ours = channels_last(ConvEnergy(settings).to(device).requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    shape = (batch, settings.channels, settings.image_size, settings.image_size)
    x = torch.rand(shape, generator=generator).mul_(2).sub_(1).to(device)
    noise = KeyedNoise(chain_keys(0, "bench", range(batch), range(1))[0].to(device))
    chain = LangevinSettings(steps=steps)

    def run(precision: str) -> Callable[[], object]:
        return lambda: run_chain(x, noise, energy=ours, settings=chain, precision=precision)

    # A gradient through the whole chain is one more competitor here, once there is one.
    return {"published": lambda: published_chain(published, x, steps)} | {
        p: run(p) for p in precisions
    }


def precisions_here(device: torch.device) -> list[str]:
    """Return the precisions worth measuring on a device: fp32, and bf16 where it is native."""
    fastest = resolve_precision("auto", device, torch.float32)
    return list(dict.fromkeys(["fp32", fastest]))


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


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a whole evaluation by the published protocol costs, classifier passes left out.

    Attributes:
        looks: gradients and checks of one image: 50 steps, the start and the clean image.
        replicates: chains a look.
        steps: K.
        verification: chains of one verification.
        verifications: how many an image needs on average, an assumption.
        robust: share of images that are never broken, an assumption.
        broken_after: share of the looks after which a broken image falls, an assumption.
    """

    looks: int = 52
    replicates: int = 15
    steps: int = 1500
    verification: int = 150
    verifications: float = 2.0
    robust: float = 0.55
    broken_after: float = 0.25

    def chain_steps(self, images: int, *, drop_broken: bool) -> float:
        """Return the chain-steps of an evaluation; broken images go on unless they are dropped."""
        share = self.robust + (1 - self.robust) * self.broken_after if drop_broken else 1.0
        looks = self.looks * self.replicates * share
        return images * self.steps * (looks + self.verification * self.verifications)
