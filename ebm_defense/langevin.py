"""Langevin dynamics as the paper has it: the update, one step, one chain.

A chain is a step `(state, move) -> (state, info)`, repeated; `engine` makes ∇U, and nothing else,
faster. Everything here is in the energy's own [-1, 1] units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import Energy, EnergyGradient, prepare, triton_kernels
from ebm_defense.engine.cuda_graphs import run_graphed
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.metropolis import AdjustedState, Draw, adjusted_step, draws
from ebm_defense.noise import KeyedNoise, Noise, ahead, drawn_at
from ebm_defense.precision.names import resolve_precision


@dataclass(frozen=True, kw_only=True)
class LangevinSettings:
    """How a chain moves: x ← x − (ε²/2)·∇U(x)/T + ε·z.

    The defaults are the published update for CIFAR-10 (Hill, Mitchell, Zhu 2021), which is
    x ← x − ∇U(x) + ε·z, since ε²/2 = T.

    Attributes:
        steps: K ≥ 0.
        step_size: ε > 0, in [-1, 1] pixel units.
        temperature: T > 0, in units of the energy.
        adjusted: whether a Metropolis test accepts or refuses each step (MALA), so that the chain
            has exp(−U/T) as its law whatever the step size; see `metropolis`.
    """

    steps: int = 1500
    step_size: float = 0.01
    temperature: float = 5e-5
    adjusted: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
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
    """What a person wants to see of a step: ∇U(x) before it, U(x) `[b]` if it was asked for, and
    of an adjusted step who moved, bool `[b]`.
    """

    gradient: Tensor
    energy: Tensor | None = None
    accepted: Tensor | None = None


Take = Callable[[State], tuple[State, Info]]
"""A step with all that it needs but the state."""


def langevin_step(
    state: State,
    move: Callable[[Tensor, Tensor], None],
    gradient: EnergyGradient,
    *,
    with_energy: bool = False,
) -> tuple[State, Info]:
    """Take one step of unadjusted Langevin dynamics (Hill, Mitchell, Zhu 2021, eq. 4).

    Args:
        state: its positions are written over.
        move: the update with this step's noise; see `moves`.
        gradient: ∇U.
        with_energy: whether to compute U(x) too.
    """
    x, step = state
    energy, slope = gradient.with_energy(x) if with_energy else (None, gradient(x))
    move(x, slope)
    return State(x, step + 1), Info(slope, energy)


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
    gradient: EnergyGradient | None = None,
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
        gradient: ∇U, where it is prepared already.
    """
    precision = chain_precision(precision, x, settings)
    gradient = gradient or prepare(energy, x, precision, engine)
    steps, move = range(first, first + settings.steps), settings.move
    noise = drawn_at(x.device, noise, len(x))
    start, state = x.detach(), State(_own(x), first)
    graphs = trace is None and not settings.adjusted
    if graphs and run_graphed(state.x, noise, steps, gradient, move):
        return state.x
    if trace is not None:
        trace.snapshot(state, snapshots)
    for take in _takes(state, noise, steps, gradient, settings, trace is not None):
        state, info = take(state)
        if trace is not None:
            trace.record(info, state.x - start, settings)
            trace.snapshot(state, snapshots)
    return state.x


def _takes(
    start: State,
    noise: Noise,
    steps: range,
    gradient: EnergyGradient,
    settings: LangevinSettings,
    with_energy: bool,
) -> Iterator[Take]:
    """Yield each step, as what makes of a state the next one and tells what it was like."""
    if settings.adjusted:
        yield from _adjusted_takes(start, noise, steps, gradient, settings)
        return
    for move in moves(settings.move, noise, steps, start.x):
        yield partial(langevin_step, move=move, gradient=gradient, with_energy=with_energy)


def _adjusted_takes(
    start: State, noise: Noise, steps: range, gradient: EnergyGradient, settings: LangevinSettings
) -> Iterator[Take]:
    if not steps:
        return
    scale = {"step_size": settings.step_size, "temperature": settings.temperature}
    # An engine may write over what it returned before.
    here = AdjustedState(*start, *(t.clone() for t in gradient.with_energy(start.x)))

    def take(_: State, draw: Draw) -> tuple[State, Info]:
        nonlocal here
        before = here
        here, accepted = adjusted_step(before, draw, gradient, **scale)
        return State(here.x, here.step), Info(before.slope, before.energy, accepted)

    for draw in draws(noise, steps, start.x):
        yield partial(take, draw=draw)


def chain_precision(precision: str, x: Tensor, settings: LangevinSettings) -> str:
    """Return the resolved precision of a chain from x; of an adjusted one fp32 for "fastest".

    Raises:
        UsageError: an unknown precision, or a rounded one for adjusted chains, whose test compares
            energies to a fraction of the temperature.
    """
    if not settings.adjusted or precision == "fastest":
        asked = "fp32" if settings.adjusted else precision
        return resolve_precision(asked, x.device, x.dtype)
    resolved = resolve_precision(precision, x.device, x.dtype)
    if resolved not in ("fp32", "fp64"):
        raise UsageError(
            f"an adjusted chain compares energies, which {precision} rounds too much; give it "
            "precision fp32."
        )
    return resolved


def chain_states(
    x: Tensor,
    noise: Noise,
    stops: Sequence[int],
    *,
    energy: Energy,
    settings: LangevinSettings,
    precision: str = "fp32",
    first: int = 0,
) -> list[Tensor]:
    """Run a chain from step `first` and return copies of x at the numbers of steps in `stops`.

    The states are `run_chain`'s, whose arguments these are; the network is prepared once for all.
    """
    gradient = prepare(energy, x, chain_precision(precision, x, settings))
    noise, found = drawn_at(x.device, noise, len(x)), []
    for stop in stops:
        part = replace(settings, steps=stop - first)
        x = run_chain(x, noise, energy=energy, settings=part, first=first, gradient=gradient)
        first = stop
        found.append(x)
    return found


def _own(x: Tensor) -> Tensor:
    """Return a copy to write over; on a GPU in the layout in which graphs and kernels move it."""
    if x.device.type == "cuda":
        return x.detach().clone(memory_format=torch.contiguous_format)
    return x.detach().clone()


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What happened along a chain; every list has one entry a step, each a tensor `[b]`.

    Attributes:
        energy: U(x) before the step.
        gradient_norm: ‖∇U(x)·ε²/(2T)‖₂, the drift in displacement units.
        displacement: ‖x − x_0‖₂ after the step.
        accepted: who moved, 0 or 1; empty of chains that are not adjusted.
        snapshots: step → x at that step, for the steps asked for (0 is the start).
    """

    energy: list[Tensor] = field(default_factory=list)
    gradient_norm: list[Tensor] = field(default_factory=list)
    displacement: list[Tensor] = field(default_factory=list)
    accepted: list[Tensor] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)

    def record(self, info: Info, moved: Tensor, settings: LangevinSettings) -> None:
        """Enter a step, after which chains have moved so far from their start, `[b, C, H, W]`."""
        assert info.energy is not None
        drift = info.gradient * settings.drift
        self.energy.append(info.energy.float())
        self.gradient_norm.append(drift.flatten(1).norm(dim=1))
        self.displacement.append(moved.flatten(1).norm(dim=1))
        if info.accepted is not None:
            self.accepted.append(info.accepted.float())

    @property
    def acceptance(self) -> float | None:
        """The share of all steps that were accepted; None of chains that are not adjusted."""
        return float(torch.stack(self.accepted).mean()) if self.accepted else None

    def snapshot(self, state: State, steps: Collection[int]) -> None:
        """Keep a copy of the state if it is one of those steps'."""
        if state.step in steps:
            self.snapshots[state.step] = state.x.clone()
