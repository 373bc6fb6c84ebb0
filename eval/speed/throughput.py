"""How many Langevin steps a second this machine takes, beside the published loop and the roofline.

A gradient through the chain stands beside the forward chain that it goes back through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_defense.attacks.gradients.full import ChainGradient, Full
from ebm_defense.attacks.gradients.smoothed import Smoothed
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.engine.derivatives import tf32
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings, Work, product_work, step_work
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.precision.names import resolve_precision
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.runtime.timing import Clock, alternate, peak_memory

PUBLISHED, PUBLISHED_EPS = "published", 0.01
GRADIENTS: dict[str, ChainGradient] = {"soft_lrelu": Full(), "leaky_relu": Smoothed()}
"""By activation, the gradient through the chain that an attack uses there, as attacks use it."""

STRICT, COMPILED = f"{PUBLISHED}, strict fp32", f"{PUBLISHED}, compiled"
"""The published loop without the TF32 that torch allows convolutions on a GPU, and compiled."""

CHAIN_STEPS, SHORTEST, LONGEST = 2000, 10, 50
GPU_CHAIN_STEPS, GPU_SHORTEST, GPU_LONGEST = 200_000, 50, 500
"""Steps of all chains together, and of one; on a GPU enough for its graphs. A gradient takes its
last step twice, which is a small part of a long chain's cost and must not be a large one of a short
chain's."""

AT_ONCE = 1000
"""Chains that a gradient goes back through at a time: more hold more memory and are no faster."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One competitor's measurement.

    Attributes:
        layout: a name in `LAYOUTS`.
        batch: chains at a time.
        name: "published", ours by its precision, or a gradient by its chain's.
        steps_per_second: Langevin steps of one image a second; a gradient's chain is counted once.
        ratio: to the published loop's steps a second.
        over_forward: a gradient's time, forward chain and way back, over that of our forward chain
            in the same precision; None for chains.
        roofline: share of the bound that ceilings and formulas give (`Work.least_seconds`).
        convolution: share of the measured convolution ceiling.
        memory: highest bytes held during it, of the process on a CPU; None where unknown.
    """

    layout: str
    batch: int
    name: str
    steps_per_second: float
    ratio: float
    over_forward: float | None
    roofline: float
    convolution: float
    memory: int | None


class Competitor(NamedTuple):
    """One way to run the chains.

    Attributes:
        run: runs them all once.
        work: of one image's step, with the ceilings under which it is done.
        forward: of a gradient, the name of the chain that it goes back through.
    """

    run: Callable[[], object]
    work: list[tuple[Work, Ceilings]]
    forward: str | None = None

    @property
    def least_seconds(self) -> float:
        """The least time of a step that its ceilings allow."""
        return sum(work.least_seconds(ceilings) for work, ceilings in self.work)

    @property
    def convolution_seconds(self) -> float:
        """The time of a step's arithmetic at the convolution ceilings."""
        return sum(work.flops / ceilings.convolution for work, ceilings in self.work)


class Start(NamedTuple):
    """Where all competitors' chains start: states `[b, C, H, W]` in [-1, 1], and their keys."""

    x: Tensor
    keys: Tensor
    chain: LangevinSettings


def published_chain(energy: nn.Module, x: Tensor, steps: int) -> Tensor:
    """Run the chain as the published code does: eager, fp32, NCHW, weights that want gradients."""
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(energy(x).sum(), [x])
        x = x - slope + PUBLISHED_EPS * torch.randn_like(x)
    return x.detach()


def measure(
    layout: str,
    batch: int,
    ceilings: list[Ceilings],
    seconds: float,
    device: torch.device,
    clock: Clock = time.perf_counter,
    compiled: bool = False,
) -> list[Cell]:
    """Measure the published loop, ours and the gradient through ours, at one layout and batch.

    Args:
        layout: a name in `LAYOUTS`.
        batch: chains at a time.
        ceilings: of the precisions in which ours runs, fp32 among them.
        seconds: for each competitor.
        device: where to compute.
        clock: see `alternate`.
        compiled: whether the published loop also runs compiled.
    """
    start = start_of(LAYOUTS[layout], batch, steps_of(batch, device), device)
    found = competitors(LAYOUTS[layout], start, ceilings, compiled)
    steps = start.chain.steps
    runs = {name: c.run for name, c in found.items()}
    times = alternate(runs, seconds, device, clock)
    rate = {name: batch * steps / t for name, t in times.items()}
    return [
        Cell(
            layout=layout,
            batch=batch,
            name=name,
            steps_per_second=rate[name],
            ratio=rate[name] / rate[PUBLISHED],
            over_forward=None if c.forward is None else times[name] / times[c.forward],
            roofline=rate[name] * c.least_seconds,
            convolution=rate[name] * c.convolution_seconds,
            memory=peak_memory(c.run, device),
        )
        for name, c in found.items()
    ]


def steps_of(batch: int, device: torch.device) -> int:
    """Return how many steps chains of a batch of this size take."""
    if device.type == "cuda":
        return max(GPU_SHORTEST, min(GPU_LONGEST, GPU_CHAIN_STEPS // batch))
    return max(SHORTEST, min(LONGEST, CHAIN_STEPS // batch))


def start_of(settings: ConvEnergySettings, batch: int, steps: int, device: torch.device) -> Start:
    """Return chains of so many steps from uniform noise."""
    shape = (batch, settings.channels, settings.image_size, settings.image_size)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)
    keys = chain_keys(0, "bench", range(batch), range(1))
    return Start(x.to(device), keys.to(device), LangevinSettings(steps=steps))


def published_loops(
    settings: ConvEnergySettings, start: Start, compiled: bool
) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Return by name the published loop as torch runs it, and its variants; with each the precision
    of its arithmetic, which on a GPU is TF32 where nobody says otherwise.
    """
    network, x, steps = ConvEnergy(settings).to(start.x.device), start.x, start.chain.steps
    usual = "tf32" if "tf32" in precisions_here(x.device) else "fp32"
    found = {PUBLISHED: (usual, lambda: published_chain(network, x, steps))}

    def strictly() -> Tensor:
        with tf32(False, x.device):
            return published_chain(network, x, steps)

    if usual != "fp32":
        found[STRICT] = ("fp32", strictly)
    if compiled:
        fast: nn.Module = torch.compile(network)  # type: ignore[assignment]
        found[COMPILED] = (usual, lambda: published_chain(fast, x, steps))
    return found


def competitors(
    settings: ConvEnergySettings, start: Start, ceilings: list[Ceilings], compiled: bool = False
) -> dict[str, Competitor]:
    """Return by name the published loops, our chain, and the gradient through it, each in the
    precision of every ceiling; a gradient's products are fp32 whatever its chain is.
    """
    ours = channels_last(ConvEnergy(settings).to(start.x.device).requires_grad_(False))
    limits = {c.precision: c for c in ceilings}
    step = {p: (step_work(settings, p), limit) for p, limit in limits.items()}
    gradient = GRADIENTS[settings.activation]
    product = product_work(settings, gradient.precision).over(gradient.spacing)
    loops = published_loops(settings, start, compiled)
    found = {name: Competitor(run, [step[limit_of(p, limits)]]) for name, (p, run) in loops.items()}
    for p in limits:
        found[p] = Competitor(forward_chain(ours, start, p), [step[p]])
        back = gradient_through(ours, start, p, gradient)
        work = [step[p], (product, limits[gradient.precision])]
        found[gradient_name(gradient, p)] = Competitor(back, work, forward=p)
    return found


def limit_of(precision: str, limits: Mapping[str, Ceilings]) -> str:
    """Return the precision whose ceiling bounds work in this one: itself if it was measured."""
    return precision if precision in limits else "fp32"


def gradient_name(gradient: ChainGradient, precision: str) -> str:
    """Return what a gradient through a chain in this precision is called."""
    return f"{type(gradient).__name__.lower()}, {precision} chain"


def forward_chain(energy: nn.Module, start: Start, precision: str) -> Callable[[], Tensor]:
    """Return the chain as something to run."""
    x, noise = start.x, KeyedNoise(start.keys[0])
    return lambda: run_chain(x, noise, energy=energy, settings=start.chain, precision=precision)


def gradient_through(
    energy: nn.Module,
    start: Start,
    precision: str,
    gradient: ChainGradient,
    max_chains: int = AT_ONCE,
) -> Callable[[], Tensor]:
    """Return the chain and a cotangent's way back through it as something to run."""
    chain = LangevinPurifier(energy, **vars(start.chain), precision=precision)
    defense = PurifiedClassifier(nn.Identity(), chain, max_chains=max_chains)
    images = chain.leave(start.x)
    return lambda: gradient.purify(defense, images, start.keys).vjp(images[None])


def precisions_here(device: torch.device) -> list[str]:
    """Return the precisions worth measuring on a device: fp32, TF32 and bf16 if it has them."""
    asked = (resolve_precision(p, device, torch.float32) for p in ("fp32", "tf32", "fastest"))
    return list(dict.fromkeys(asked))
