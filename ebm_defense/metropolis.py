"""The Metropolis-adjusted Langevin algorithm, MALA (Roberts, Tweedie 1996).

A Langevin step only proposes; a Metropolis test accepts it or leaves the chain where it is, so that
the chain has exp(−U/T) as its law whatever the step size. Everything is in [-1, 1] units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import EnergyGradient
from ebm_defense.noise import Noise, ahead


class AdjustedState(NamedTuple):
    """What the next step needs: positions `[b, C, H, W]`, steps taken, U `[b]` and ∇U there."""

    x: Tensor
    step: int
    energy: Tensor
    slope: Tensor


class Draw(NamedTuple):
    """A step's draws: normals z of x's shape, and the logarithms `[b]` of uniform numbers."""

    z: Tensor
    log_uniform: Tensor


def adjusted_step(
    state: AdjustedState,
    draw: Draw,
    gradient: EnergyGradient,
    *,
    step_size: float,
    temperature: float,
) -> tuple[AdjustedState, Tensor]:
    """Propose a step of Langevin dynamics and accept it or stay (Roberts, Tweedie 1996, MALA).

    With g = ∇U·ε/(2T) the proposal is x' = x + ε·(z − g), the way back from it would need
    z' = g + g' − z, and it is accepted with probability
    min(1, exp((U − U')/T + (‖z‖² − ‖z'‖²)/2)).

    Args:
        state: where chains are, with the energy and its gradient there.
        draw: this step's.
        gradient: ∇U, in fp32 or fp64.
        step_size: ε > 0, in [-1, 1] units.
        temperature: T > 0, in units of the energy.

    Returns:
        The next state, and who moved, bool `[b]`; a proposal without a finite energy is refused.
    """
    scale = step_size / (2.0 * temperature)
    x = state.x + step_size * (draw.z - scale * state.slope)
    energy, slope = gradient.with_energy(x)
    back = scale * (state.slope + slope) - draw.z
    gain = (state.energy.double() - energy.double()) / temperature
    # Written so that a NaN is refused.
    accepted = draw.log_uniform < gain + 0.5 * (_square(draw.z) - _square(back))
    moved = AdjustedState(x, state.step + 1, energy, slope)
    return _where(accepted, moved, state), accepted


def _square(z: Tensor) -> Tensor:
    return z.double().square().flatten(1).sum(1)


def _where(accepted: Tensor, moved: AdjustedState, state: AdjustedState) -> AdjustedState:
    wide = accepted.view(-1, *[1] * (moved.x.ndim - 1))
    return AdjustedState(
        torch.where(wide, moved.x, state.x),
        moved.step,
        torch.where(accepted, moved.energy, state.energy),
        torch.where(wide, moved.slope, state.slope),
    )


def draws(noise: Noise, steps: range, x: Tensor) -> Iterator[Draw]:
    """Yield each step's draws for chains such as x, all from the noise of that step.

    The uniform number is Φ of one normal more than the image has pixels, so that any noise will do.
    """
    size = x[0].numel() if len(x) else 0
    like = x.new_empty(len(x), size + 1)
    for z in ahead(noise, steps, like):
        yield Draw(z[:, :size].reshape(x.shape), torch.special.log_ndtr(z[:, size].double()))
