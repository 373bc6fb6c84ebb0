"""One Langevin step, one chain.

A chain is a pure step `(state, noise) -> (state, info)`, repeated. Everything here is in the
energy's own [-1, 1] units.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import Energy, EnergyGradient, energy_and_gradient, prepare
from ebm_defense.errors import UsageError
from ebm_defense.noise import Noise, ahead

PRECISIONS = ("auto", "fp32", "bf16")


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


class State(NamedTuple):
    """What the next step needs: positions `[b, C, H, W]` and the number of steps taken."""

    x: Tensor
    step: int = 0


class Info(NamedTuple):
    """What a person wants to see of a step: U(x) before it `[b]` and the gradient of U/T there."""

    energy: Tensor
    gradient: Tensor


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return "fp32" or "bf16" for "auto": bf16 where the processor multiplies it natively.

    Only the energy's inner activations lose digits; state, noise and update keep `dtype`. In
    float64 there is nothing to choose. The caller's float64 always wins.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    if dtype == torch.float64:
        return "fp64"
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


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
    precision: str = "auto",
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
        precision: one of `PRECISIONS`, for the energy's inner activations.
        engine: a name in `ENGINES`, or "auto" for the fastest that supports the energy.
        trace: filled when given.
        snapshots: the steps at which `trace` keeps a copy of x.
        first: the number of the first step, on which its noise depends.
    """
    precision = resolve_precision(precision, x.device, x.dtype)
    gradient = prepare(energy, x, precision, engine)
    steps = range(first, first + settings.steps)
    if trace is None:
        return _run(x, noise, steps, gradient, settings)
    return _run_traced(x, noise, steps, gradient, settings, trace, snapshots)


def _run(
    x: Tensor, noise: Noise, steps: range, gradient: EnergyGradient, settings: LangevinSettings
) -> Tensor:
    x = x.detach().clone()
    for z in ahead(noise, steps, x):
        _move(x, gradient(x), z, settings)
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
    for step, z in zip(steps, ahead(noise, steps, x), strict=True):
        _snapshot(trace, snapshots, State(x, step))
        value, slope = gradient.with_energy(x)
        _move(x, slope, z, settings)
        _record(trace, Info(value, slope / settings.temperature), x - start, settings)
    _snapshot(trace, snapshots, State(x, steps.stop))
    return x


def _move(x: Tensor, gradient: Tensor, z: Tensor, settings: LangevinSettings) -> None:
    x.sub_(gradient, alpha=settings.drift).add_(z, alpha=settings.step_size)


def _record(trace: Trace, info: Info, moved: Tensor, settings: LangevinSettings) -> None:
    drift = info.gradient * (settings.step_size**2 / 2.0)
    trace.energy.append(info.energy.float())
    trace.gradient_norm.append(drift.flatten(1).norm(dim=1))
    trace.displacement.append(moved.flatten(1).norm(dim=1))


def _snapshot(trace: Trace | None, steps: Collection[int], state: State) -> None:
    if trace is not None and state.step in steps:
        trace.snapshots[state.step] = state.x.clone()
