"""Learning an energy: batches, weights, averages, processes, checkpoints, and the way back.

What moves the weights is an objective (`energy_objectives`); the usual one is maximum likelihood,
with chains that begin where a start (`starts`) says.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.interface.inputs import read_training_images
from ebm_defense.interface.outputs import try_energy
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.learning.draws import Batch, Draws, batch_of
from ebm_defense.learning.energies.objectives import EnergyObjective
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.registry import Parts, make_objective
from ebm_defense.learning.parallel import Team
from ebm_defense.storage.files import load_plain, save_state
from ebm_defense.storage.state_dicts import about

PIXEL_LIMIT = 6.0

_log = logging.getLogger("ebm_defense.learning")


class DivergedError(FailedRunError):
    """Learning has run away; the message says how far it came."""


class Update(NamedTuple):
    """One update's diagnostics (Nijkamp et al. 2019): d_s, and r_s in displacement units.

    An objective without chains shows its loss in place of d_s, and 0 for r_s.
    """

    number: int
    energy_difference: float
    gradient_strength: float


class EnergyTrainer:
    """Learns `energy` on `images`; iterate `run()` and look at each `Update`.

    Every draw is a function of (seed, update, place in the batch). A run goes on exactly where it
    stopped, and as many processes as share it make the same updates, up to rounding.

    Args:
        energy: the network, trained in place.
        images: training images `[N, C, H, W]` in [0, 1], as `read_training_images` takes them.
        recipe: all settings.
        precision: of the chains' inner activations, one of `PRECISIONS`; "fastest" takes
            bf16 unchecked where it is native, since an energy is learned by whatever chains it is
            given, and how its fp32 chains go shows afterwards. The weight update is always fp32.
        objective: what moves the weights, where it is not the recipe's.
        generator: what draws the starts "generator" and "cooperative".
        team: the processes that learn together, each of them with the same arguments.

    Raises:
        UsageError: images outside [0, 1], NaN, none, or such as the energy cannot take; or a batch
            that the team cannot share.
    """

    def __init__(
        self,
        energy: nn.Module,
        images: Any,
        recipe: EnergyRecipe,
        precision: str = "fastest",
        *,
        objective: EnergyObjective | None = None,
        generator: nn.Module | None = None,
        team: Team | None = None,
    ) -> None:
        images = read_training_images(images, energy)
        try_energy(energy, images)
        self.team = team or Team()
        self.team.refuse_uneven(recipe.batch, recipe.accumulate)
        self.energy, self.recipe, self.generator = energy, recipe, generator
        self.device = next(energy.parameters()).device
        self.images = images * 2.0 - 1.0
        self.averaged = torch.optim.swa_utils.AveragedModel(
            energy, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.average)
        )
        self.history: list[Update] = []
        self.setbacks = 0
        self.saved: Path | None = None
        parts = Parts(
            recipe=recipe,
            images=self.images,
            places=self._batch,
            precision=precision,
            team=self.team,
            generator=generator,
        )
        self.objective = objective or make_objective(parts)
        self.optimiser = self._optimiser()

    @property
    def done(self) -> int:
        """Updates taken so far."""
        return len(self.history)

    def run(self) -> Iterator[Update]:
        """Update until the recipe's number is reached, yielding each update's diagnostics.

        After a divergence the run goes back to what `save` or `load` had last, with half the
        learning rate, as often as the recipe allows; the updates since then are yielded again.

        Raises:
            DivergedError: a NaN, a pixel beyond ±6, or d_s beyond the recipe's limit, and no way
                back. The weights are then as they were before the bad update.
        """
        while self.done < self.recipe.updates:
            try:
                update = self._update()
            except DivergedError as error:
                self._go_back(error)
                continue
            yield update

    def _go_back(self, error: DivergedError) -> None:
        setbacks = self.setbacks + 1
        if self.saved is None or setbacks > self.recipe.setbacks:
            raise error
        bad = self.done + 1
        self.load(self.saved)
        self.setbacks = setbacks
        _log.warning(
            "learning diverged at update %d; it goes on from update %d with 1/%d of the learning "
            "rate (setback %d of %d).",
            *(bad, self.done, 2**setbacks, setbacks, self.recipe.setbacks),
        )

    def _optimiser(self) -> torch.optim.Optimizer:
        r = self.recipe
        if r.sgd_from is not None and self.done >= r.sgd_from:
            return torch.optim.SGD(self.energy.parameters(), lr=r.sgd_lr * r.langevin.temperature)
        return torch.optim.Adam(self.energy.parameters(), lr=r.adam_lr)

    def _batch(self, update: int, whole: int) -> Batch:
        """Return this process's share of a batch of so many places."""
        draws = Draws(
            seed=self.recipe.seed,
            update=update,
            places=self.team.places(whole),
            batch=whole,
            device=self.device,
        )
        return batch_of(self.images, draws)

    def _update(self) -> Update:
        if self.done == self.recipe.sgd_from:
            self.optimiser = self._optimiser()
        self.optimiser.zero_grad(set_to_none=True)
        update = self._estimate(self._batch(self.done, self.recipe.batch))
        self._descend()
        self.objective.keep()
        self.history.append(update)
        return update

    def _estimate(self, batch: Batch) -> Update:
        """Make the gradients of a batch, part by part, and return what it shows."""
        shown, furthest = [0.0, 0.0], 0.0
        for part in batch.parts(self.recipe.accumulate):
            found = self.objective.estimate(self.energy, part)
            share = len(part) / len(batch)
            (found.loss * share).backward()
            for i, number in enumerate((found.difference, found.strength)):
                shown[i] += share * float(number)
            furthest = _largest(furthest, float(found.furthest))
        update = Update(self.done + 1, *self.team.mean(shown, self.device))
        self._check(update, self.team.largest(furthest, self.device))
        return update

    def _descend(self) -> None:
        rate = self.recipe.rate(self.done) * 0.5**self.setbacks
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.team.average(p.grad for p in self.energy.parameters() if p.grad is not None)
        self.optimiser.step()
        self.averaged.update_parameters(self.energy)

    def _check(self, update: Update, furthest: float) -> None:
        # Written so that a NaN fails the comparison.
        if abs(update.energy_difference) < self.recipe.limit and furthest < PIXEL_LIMIT:
            return
        self.objective.drop()
        self.optimiser.zero_grad(set_to_none=True)
        raise DivergedError(
            f"learning diverged at update {update.number}: d_s = {update.energy_difference:.3g}, "
            f"largest pixel {furthest:.3g}; lower the learning rate or step size, or raise the "
            "data noise, and resume from the last checkpoint."
        )

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically.

        In a team everyone calls it; the leader writes.
        """
        chains = self.objective.state()
        if self.team.leads:
            save_state(path, self._state(chains))
        self.team.wait()
        self.saved = path

    def _state(self, chains: dict[str, Any]) -> dict[str, Any]:
        return {
            "about": self._about(),
            "energy": self.energy.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "objective": chains,
            "setbacks": self.setbacks,
            "history": torch.tensor([list(u) for u in self.history], dtype=torch.float64),
        }

    def _about(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, **about(self.energy), "batch": self.recipe.batch}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`, of a team of any size.

        Raises:
            UsageError: a missing or damaged checkpoint, or one of another network, bank or seed.
        """
        state = load_plain(path, "cpu")
        refuse_another(state, self._about(), path)
        try:
            self._restore(state)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is no checkpoint of this network and recipe: {error}"
            ) from error
        self.saved = path

    def _restore(self, state: dict[str, Any]) -> None:
        self.energy.load_state_dict(state["energy"])
        self.averaged.load_state_dict(state["averaged"])
        self.history = [Update(int(n), d, r) for n, d, r in state["history"].tolist()]
        self.setbacks = int(state["setbacks"])
        self.optimiser = self._optimiser()
        self.optimiser.load_state_dict(state["optimiser"])
        self.objective.restore(state["objective"])


def _largest(before: float, value: float) -> float:
    """Return the larger of two, and NaN if one is."""
    return value if not value <= before else before
