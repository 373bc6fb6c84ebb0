"""What an energy's weights are moved by: one object for each way to learn.

An objective turns a batch into a loss. It keeps whatever goes on from update to update, such as
chains, and says so when it is asked for its state. The trainer does the rest: batches and their
parts, processes, the optimiser, averages, checkpoints, and the way back after a divergence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ebm_defense.engine import Energy, EnergyGradient, prepare
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.langevin import LangevinSettings, chain_precision, run_chain
from ebm_defense.learning.draws import Batch
from ebm_defense.learning.energies.starts import Start
from ebm_defense.noise import KeyedNoise


class Estimate(NamedTuple):
    """A loss, and what a person wants to see of it.

    Attributes:
        loss: what the weights are to lower, a mean over the batch's images.
        difference: what is drawn against the updates: d_s, or the loss of an objective without
            chains.
        strength: r_s, the chains' mean drift a step in displacement units; 0 without chains.
        furthest: the chains' largest pixel, by its absolute value; 0 without chains.
    """

    loss: Tensor
    difference: Tensor
    strength: Tensor | float = 0.0
    furthest: Tensor | float = 0.0


class EnergyObjective(Protocol):
    """A way to learn an energy.

    Attributes:
        ends: where this process's chains ended last, `[b, C, H, W]` in [-1, 1], for pictures; None
            without chains.
    """

    ends: Tensor | None

    def estimate(self, energy: nn.Module, batch: Batch) -> Estimate:
        """Return the loss on a batch, or on a part of one, whose draws are the batch's own."""
        ...

    def keep(self) -> None:
        """Take up what the last estimates left, such as the chains' ends: the update counts."""
        ...

    def drop(self) -> None:
        """Forget what the last estimates left: the update does not count."""
        ...

    def lifetime(self) -> float:
        """Return how many steps a chain lives on average; 0 without chains."""
        ...

    def state(self) -> dict[str, Any]:
        """Return everything that it must know to go on, the whole team's; called by all of it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            KeyError, ValueError: one of another objective.
        """
        ...


class Stateless:
    """What objectives share that have no chains and know nothing from update to update."""

    ends: Tensor | None = None

    def keep(self) -> None:
        """Have nothing to keep."""

    def drop(self) -> None:
        """Have nothing to forget."""

    def lifetime(self) -> float:
        return 0.0

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Need nothing."""


class MaximumLikelihood:
    """d_s = (mean U(x⁺) − mean U(x⁻))/T, whose gradient is the likelihood's (Hill et al. 2021).

    Args:
        start: where the negatives' chains begin.
        langevin: steps K, step size and temperature of the chains.
        data_noise: standard deviation of the noise on x⁺, in [-1, 1] units.
        precision: of the chains' inner activations, one of `PRECISIONS`, unchecked.
    """

    def __init__(
        self,
        start: Start,
        langevin: LangevinSettings,
        data_noise: float,
        precision: str = "fastest",
    ) -> None:
        self.start, self.langevin = start, langevin
        self.data_noise, self.precision = data_noise, precision
        self.ends: Tensor | None = None
        self._parts: list[tuple[Batch, Tensor]] = []

    def estimate(self, energy: nn.Module, batch: Batch) -> Estimate:
        ends, strength = self.sample(energy, batch)
        self._parts.append((batch, ends))
        both = energy(torch.cat([batch.noisy(self.data_noise), ends[: len(batch)]]))
        positive, negative = both.tensor_split(2)
        difference = (positive.mean() - negative.mean()) / self.langevin.temperature
        return Estimate(difference, difference.detach(), strength, ends.abs().max())

    def sample(self, energy: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the batch's chains; return their ends and r_s."""
        states, noise = self.start.draw(batch), batch.draws.noise("chains")
        # Chains beyond the batch's own have noise of their own.
        extra = batch.draws.noise("further chains")
        noise = KeyedNoise(torch.cat([noise.keys, extra.keys])[: len(states)])
        # A chain is of one energy: dropout or batch statistics would make it another every step.
        with in_eval_mode(modules_of(energy)):
            gradient = Measured(self._gradient(energy, states))
            ends = run_chain(
                states, noise, energy=energy, settings=self.langevin, gradient=gradient
            )
        return ends, gradient.strength * self.langevin.drift

    def _gradient(self, energy: Energy, states: Tensor) -> EnergyGradient:
        return prepare(energy, states, chain_precision(self.precision, states, self.langevin))

    def keep(self) -> None:
        if self._parts:
            batch, ends = _joined(self._parts)
            self.start.keep(batch, ends)
            self.ends = ends[: len(batch)]
        self.drop()

    def drop(self) -> None:
        self._parts = []

    def lifetime(self) -> float:
        return self.start.visits() * self.langevin.steps

    def state(self) -> dict[str, Any]:
        return self.start.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.start.restore(state)


def _joined(parts: list[tuple[Batch, Tensor]]) -> tuple[Batch, Tensor]:
    """Return the batch that was cut into parts, and its chains' ends, further chains last."""
    batches = [batch for batch, _ in parts]
    whole = Batch(
        images=torch.cat([b.images for b in batches]),
        draws=replace(batches[0].draws, places=tuple(i for b in batches for i in b.draws.places)),
    )
    negatives = [ends[: len(batch)] for batch, ends in parts]
    return whole, torch.cat([*negatives, *[ends[len(batch) :] for batch, ends in parts]])


class Measured:
    """A gradient that remembers its mean norm over chains and steps."""

    signature = None  # what it remembers is no part of a graph

    def __init__(self, gradient: EnergyGradient) -> None:
        self.gradient, self.reads = gradient, gradient.reads
        self.total: Tensor | float = 0.0
        self.calls = 0

    @property
    def strength(self) -> Tensor:
        """Mean of ‖∇U‖₂ so far."""
        return torch.as_tensor(self.total) / max(self.calls, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self._measured(self.gradient(x))

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy, slope = self.gradient.with_energy(x)
        return energy, self._measured(slope)

    def _measured(self, slope: Tensor) -> Tensor:
        self.total = self.total + slope.flatten(1).norm(dim=1).mean()
        self.calls += 1
        return slope
