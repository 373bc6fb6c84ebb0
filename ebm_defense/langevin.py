"""One Langevin step, one chain.

A chain is a pure step `(state, noise) -> (state, info)`, repeated. Everything here is in the
energy's own [-1, 1] units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import Energy, EnergyGradient, energy_and_gradient, prepare, triton_kernels
from ebm_defense.engine.cuda_graphs import run_graphed
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, Noise, ahead, drawn_at

__all__ = [
    "PRECISIONS",
    "Energy",
    "Info",
    "LangevinSettings",
    "State",
    "Trace",
    "energy_and_gradient",
    "langevin_step",
    "resolve_precision",
    "run_chain",
]

PRECISIONS = ("fp32", "tf32", "bf16", "fastest")


@dataclass(frozen=True, kw_only=True)
class LangevinSettings:
    """How a chain moves: x ← x − (ε²/2)·∇U(x)/T + ε·z.

    The defaults are the published update for CIFAR-10 (Hill, Mitchell, Zhu 2021), which is
    x ← x − ∇U(x) + ε·z, since ε²/2 = T.

    Attributes:
        steps: K ≥ 0.
        step_size: ε > 0, in [-1, 1] pixel units.
        temperature: T > 0, in units of the energy.
    """

    steps: int = 1500
    step_size: float = 0.01
    temperature: float = 5e-5

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise UsageError(f"Langevin steps must be 0 or more, not {self.steps}.")
        if not 0 < self.step_size < float("inf"):
            raise UsageError(f"step_size must be above 0, not {self.step_size}.")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be above 0, not {self.temperature}.")

    @property
    def drift(self) -> float:
        """The factor ε²/(2T) in front of the energy's gradient."""
        return self.step_size**2 / (2.0 * self.temperature)

    @property
    def move(self) -> Move:
        """The update."""
        return Move(self.drift, self.step_size)


class Move(NamedTuple):
    """The update of a chain, in place: x ← x − drift·∇U(x) + step_size·z."""

    drift: float
    step_size: float

    def apply(self, x: Tensor, gradient: Tensor, z: Tensor) -> None:
        """Move x `[b, C, H, W]` with noise z of its shape."""
        x.sub_(gradient, alpha=self.drift).add_(z, alpha=self.step_size)

    def draw(self, x: Tensor, gradient: Tensor, keys: Tensor, number: Tensor, ahead: int) -> None:
        """Move x with the noise of `KeyedNoise(keys)`, drawn where x is; see `engine.base.Mover`.

        One kernel where Triton proved itself there. It is the way of single steps and of graphs
        alike, so that a chain does not depend on which of them took it.
        """
        if triton_kernels.fuses(x):
            triton_kernels.move_(x, gradient, keys, number, ahead, *self)
        else:
            self.apply(x, gradient, KeyedNoise(keys).normals(number + ahead, x)[0])


def moves(
    move: Move, noise: Noise, steps: range, x: Tensor
) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Yield for each step what moves chains such as x by their gradient."""
    if x.device.type == "cuda" and isinstance(noise, KeyedNoise) and noise.keys.device == x.device:
        number = torch.tensor([steps.start], device=x.device)
        for k in range(len(steps)):
            yield partial(move.draw, keys=noise.keys, number=number, ahead=k)
    else:
        yield from (partial(move.apply, z=z) for z in ahead(noise, steps, x))


class State(NamedTuple):
    """What the next step needs: positions `[b, C, H, W]` and the number of steps taken."""

    x: Tensor
    step: int = 0


class Info(NamedTuple):
    """What a person wants to see of a step: U(x) before it `[b]` and the gradient of U/T there."""

    energy: Tensor
    gradient: Tensor


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return what a precision means here: "fp32", "tf32", "bf16", or "fp64" for float64 images.

    "fastest" is what the processor multiplies natively, whether or not chains in it purify as fp32
    ones do; a purifier's "auto" asks `precision.checked_precision`. Only the energy's inner
    activations lose digits; state, noise and update keep `dtype`. float64 always wins, and what a
    GPU lacks is fp32, said once; CPUs compute "tf32" in fp32.

    Raises:
        UsageError: an unknown precision.
    """
    if precision not in PRECISIONS and (precision, dtype) != ("fp64", torch.float64):
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if dtype == torch.float64:
        return "fp64"
    if precision == "fastest":
        return "bf16" if _has_bf16(device) else "fp32"
    if precision == "tf32" and not _has_tf32(device):
        return "fp32"
    if precision == "bf16" and device.type == "cuda" and not _has_bf16(device):
        _say_once(f"{torch.cuda.get_device_name(device)} has no bf16; its chains run in fp32.")
        return "fp32"
    return precision


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _cpu_has_bf16()


@cache
def _cpu_has_bf16() -> bool:
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # since torch 2.6
    if asked is not None:
        return bool(asked())
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii")
    except OSError:
        return False


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _say_once(message: str) -> None:
    logging.getLogger("ebm_defense").warning(message)


def langevin_step(
    state: State,
    noise: Noise,
    *,
    energy: Energy,
    settings: LangevinSettings,
    precision: str = "fp32",
) -> tuple[State, Info]:
    """Take one step of unadjusted Langevin dynamics (Hill, Mitchell, Zhu 2021, eq. 4)."""
    value, gradient = energy_and_gradient(energy, state.x, precision)
    z = noise.normal(state.step, state.x)
    x = state.x - settings.drift * gradient + settings.step_size * z
    return State(x, state.step + 1), Info(value, gradient / settings.temperature)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What happened along a chain; every list has one entry a step, each a tensor `[b]`.

    Attributes:
        energy: U(x) before the step.
        gradient_norm: ‖∇U(x)·ε²/(2T)‖₂, the drift in displacement units.
        displacement: ‖x − x_0‖₂ after the step.
        snapshots: step → x at that step, for the steps asked for (0 is the start).
    """

    energy: list[Tensor] = field(default_factory=list)
    gradient_norm: list[Tensor] = field(default_factory=list)
    displacement: list[Tensor] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)


def run_chain(
    x: Tensor,
    noise: Noise,
    *,
    energy: Energy,
    settings: LangevinSettings,
    precision: str = "fp32",
    engine: str = "auto",
    trace: Trace | None = None,
    snapshots: Collection[int] = (),
    first: int = 0,
) -> Tensor:
    """Run `settings.steps` Langevin steps from x and return where they end.

    Memory does not grow with the number of steps.

    Args:
        x: `[b, C, H, W]` in [-1, 1] units (not clamped on the way).
        noise: where the normals come from.
        energy: maps `[b, C, H, W]` to `[b]`.
        settings: steps, step size, temperature.
        precision: one of `PRECISIONS`, for the energy's inner activations; fp32 unless something
            else is asked for, since nothing here checks what a faster one changes.
        engine: a name in `ENGINES`, or "auto" for the fastest that supports the energy.
        trace: filled when given.
        snapshots: the steps at which `trace` keeps a copy of x.
        first: the number of the first step, on which its noise depends.
    """
    precision = resolve_precision(precision, x.device, x.dtype)
    gradient = prepare(energy, x, precision, engine)
    steps = range(first, first + settings.steps)
    noise = drawn_at(x.device, noise, len(x))
    if trace is not None:
        return _run_traced(x, noise, steps, gradient, settings, trace, snapshots)
    x, move = x.detach().clone(), settings.move
    done = run_graphed(x, noise, steps, gradient, move)
    for take in moves(move, noise, steps[done:], x):
        take(x, gradient(x))
    return x


def _run_traced(
    x: Tensor,
    noise: Noise,
    steps: range,
    gradient: EnergyGradient,
    settings: LangevinSettings,
    trace: Trace,
    snapshots: Collection[int],
) -> Tensor:
    start, x = x.detach(), x.detach().clone()
    for step, take in zip(steps, moves(settings.move, noise, steps, x), strict=True):
        _snapshot(trace, snapshots, State(x, step))
        value, slope = gradient.with_energy(x)
        take(x, slope)
        _record(trace, Info(value, slope / settings.temperature), x - start, settings)
    _snapshot(trace, snapshots, State(x, steps.stop))
    return x


def _record(trace: Trace, info: Info, moved: Tensor, settings: LangevinSettings) -> None:
    drift = info.gradient * (settings.step_size**2 / 2.0)
    trace.energy.append(info.energy.float())
    trace.gradient_norm.append(drift.flatten(1).norm(dim=1))
    trace.displacement.append(moved.flatten(1).norm(dim=1))


def _snapshot(trace: Trace | None, steps: Collection[int], state: State) -> None:
    if trace is not None and state.step in steps:
        trace.snapshots[state.step] = state.x.clone()
