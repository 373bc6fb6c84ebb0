"""Maximum likelihood learning of an energy from persistent chains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.interface.images import check_training_images
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.learning.bank import Start, noisy_data, visit
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.noise import GeneratorNoise
from ebm_defense.storage.files import load_plain, save_state
from ebm_defense.storage.state_dicts import about

PIXEL_LIMIT = 6.0
ENERGY_LIMIT = 1e4


class DivergedError(FailedRunError):
    """Learning has run away; the message says how far it came."""


@dataclass(frozen=True, kw_only=True)
class EnergyRecipe:
    """How an energy is learned (Hill, Mitchell, Zhu 2021; Hill et al. 2022 for rejuvenation).

    Attributes:
        updates: weight updates in all.
        batch: data images and chains an update, at most `bank`.
        bank: persistent chains.
        langevin: steps K, step size and temperature of the chains between two updates.
        data_noise: σ of the noise on training images, in [-1, 1] units.
        rejuvenation: probability that a visited chain starts afresh.
        start: where fresh chains begin, "data" or "uniform".
        adam_lr, final_lr: Adam's learning rate falls from the first to the second by a cosine.
        sgd_from: the update from which plain SGD takes over, 1 or more; None for Adam throughout.
        sgd_lr: SGD's learning rate, in units of the temperature.
        average: decay of the weights' running average, the weights that are kept.
        seed: seed of every draw.
    """

    updates: int = 10_000
    batch: int = 100
    bank: int = 10_000
    langevin: LangevinSettings = field(default_factory=lambda: LangevinSettings(steps=20))
    data_noise: float = 0.02
    rejuvenation: float = 0.05
    start: str = "data"
    adam_lr: float = 1e-4
    final_lr: float = 1e-5
    sgd_from: int | None = None
    sgd_lr: float = 5e-5
    average: float = 0.999
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.bank:
            raise UsageError(
                f"batch must be between 1 and the bank's {self.bank}, not {self.batch}."
            )
        if not 0 <= self.rejuvenation <= 1 or not 0 <= self.average < 1:
            raise UsageError("rejuvenation must lie in [0, 1] and average in [0, 1).")
        if self.langevin.steps < 1:
            raise UsageError("the Langevin steps between two updates must be at least 1.")
        if self.updates < 1 or (self.sgd_from is not None and self.sgd_from < 1):
            raise UsageError("updates and sgd_from must be at least 1.")


class Update(NamedTuple):
    """One update's diagnostics (Nijkamp et al. 2019): d_s, and r_s in displacement units."""

    number: int
    energy_difference: float
    gradient_strength: float


class EnergyTrainer:
    """Learns `energy` on `images`; iterate `run()` and look at each `Update`.

    Args:
        energy: the network, trained in place.
        images: training images `[N, C, H, W]` in [0, 1].
        recipe: all settings.
        precision: of the chains' inner activations, one of `PRECISIONS`; "fastest" takes
            bf16 unchecked where it is native, since an energy is learned by whatever chains it is
            given, and how its fp32 chains go shows afterwards. The weight update is always fp32.

    Raises:
        UsageError: images outside [0, 1], NaN, or none.
    """

    def __init__(
        self, energy: nn.Module, images: Tensor, recipe: EnergyRecipe, precision: str = "fastest"
    ) -> None:
        check_training_images(images)
        self.energy, self.recipe, self.precision = energy, recipe, precision
        self.device = next(energy.parameters()).device
        self.images = images * 2.0 - 1.0
        self.start = Start(kind=recipe.start, images=self.images, noise=recipe.data_noise)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.bank = self.start.draw(recipe.bank, self.generator)
        self.averaged = torch.optim.swa_utils.AveragedModel(
            energy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
        )
        self.history: list[Update] = []
        self.optimiser = self._optimiser()

    @property
    def done(self) -> int:
        """Updates taken so far."""
        return len(self.history)

    def run(self) -> Iterator[Update]:
        """Update until the recipe's number is reached, yielding each update's diagnostics.

        Raises:
            DivergedError: a NaN, a pixel beyond ±6, or d_s beyond ±10,000. The weights are then
                as they were before the bad update.
        """
        while self.done < self.recipe.updates:
            if self.done == self.recipe.sgd_from:
                self.optimiser = self._optimiser()
            yield self._update()

    def _optimiser(self) -> torch.optim.Optimizer:
        r = self.recipe
        if r.sgd_from is not None and self.done >= r.sgd_from:
            return torch.optim.SGD(self.energy.parameters(), lr=r.sgd_lr * r.langevin.temperature)
        return torch.optim.Adam(self.energy.parameters(), lr=r.adam_lr)

    def _update(self) -> Update:
        r = self.recipe
        rows, states = visit(self.bank, self.start, r.batch, r.rejuvenation, self.generator)
        negative, strength = self._sample(states.to(self.device))
        positive = noisy_data(self.images, r.batch, r.data_noise, self.generator).to(self.device)
        difference = self.energy(positive).mean() - self.energy(negative).mean()
        loss = difference / r.langevin.temperature
        update = Update(self.done + 1, float(loss.detach()), strength)
        self._check(update, negative)
        self._descend(loss)
        self.bank[rows] = negative.cpu()
        self.history.append(update)
        return update

    def _sample(self, states: Tensor) -> tuple[Tensor, float]:
        trace = Trace()
        noise = GeneratorNoise(self.generator)
        # A chain is of one energy: dropout or batch statistics would make it another every step.
        with in_eval_mode(modules_of(self.energy)):
            ends = run_chain(
                states,
                noise,
                energy=self.energy,
                settings=self.recipe.langevin,
                precision=self.precision,
                trace=trace,
            )
        return ends, float(torch.stack(trace.gradient_norm).mean())

    def _descend(self, loss: Tensor) -> None:
        self._schedule()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.averaged.update_parameters(self.energy)

    def _schedule(self) -> None:
        r = self.recipe
        if isinstance(self.optimiser, torch.optim.SGD):
            return
        share = self.done / (r.sgd_from or r.updates)
        cosine = 0.5 * (1.0 + math.cos(math.pi * share))
        for group in self.optimiser.param_groups:
            group["lr"] = r.final_lr + (r.adam_lr - r.final_lr) * cosine

    def _check(self, update: Update, states: Tensor) -> None:
        furthest = float(states.abs().max())
        # Written so that a NaN fails the comparison.
        if abs(update.energy_difference) < ENERGY_LIMIT and furthest < PIXEL_LIMIT:
            return
        raise DivergedError(
            f"learning diverged at update {update.number}: d_s = {update.energy_difference:.3g}, "
            f"largest pixel {furthest:.3g}; lower the learning rate or step size, or raise the "
            "data noise, and resume from the last checkpoint."
        )

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        state: dict[str, Any] = {
            "about": self._about(),
            "energy": self.energy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "bank": self.bank,
            "generator": self.generator.get_state(),
            "history": torch.tensor([list(u) for u in self.history], dtype=torch.float64),
        }
        save_state(path, state)

    def _about(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, **about(self.energy)}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            UsageError: a missing or damaged checkpoint, or one of another network, bank or seed.
        """
        state = load_plain(path, "cpu")
        refuse_another(state, self._about(), path)
        try:
            self.energy.load_state_dict(state["energy"])
            self.averaged.load_state_dict(state["averaged"])
            rows = state["history"].tolist()
            self.history = [Update(int(n), d, r) for n, d, r in rows]
            self.optimiser = self._optimiser()
            self.optimiser.load_state_dict(state["optimiser"])
            if state["bank"].shape != self.bank.shape:
                raise ValueError(f"its bank has shape {tuple(state['bank'].shape)}")
            self.bank = state["bank"]
            self.generator.set_state(state["generator"])
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is no checkpoint of this network and recipe: {error}"
            ) from error
