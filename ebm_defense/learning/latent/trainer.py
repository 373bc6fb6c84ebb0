"""One trainer for every recipe of generators and energies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebm_defense.errors import UsageError
from ebm_defense.interface.inputs import read_training_images
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.learning.draws import Draws, batch_of
from ebm_defense.learning.energies.trainer import DivergedError
from ebm_defense.learning.latent.model import Model
from ebm_defense.learning.latent.recipes import RECIPES, Labelled, Losses
from ebm_defense.learning.latent.settings import LatentSettings
from ebm_defense.purifiers.path import LatentPath
from ebm_defense.storage.files import load_plain, save_state
from ebm_defense.storage.state_dicts import about

LIMIT = 1e6
"""A loss beyond it has run away."""


class Update(NamedTuple):
    """An update's number, and the loss of each network that learned."""

    number: int
    losses: dict[str, float]


class LatentTrainer:
    """Learns a model by a recipe; iterate `run()` and look at each `Update`.

    Every draw is a function of (seed, update, place in the batch), so that a run goes on exactly
    where it stopped.

    Args:
        model: the networks, trained in place.
        images: training images `[N, C, H, W]` in [0, 1].
        recipe: a name in `RECIPES`.
        settings: all numbers.
        values: of each image's attributes, int64 `[N, attributes]`, where the recipe is of them.

    Raises:
        UsageError: an unknown recipe, no attributes for one that is of them, images outside
            [0, 1], NaN, or none.
    """

    def __init__(
        self,
        model: Model,
        images: Any,
        recipe: str,
        settings: LatentSettings,
        values: Tensor | None = None,
    ) -> None:
        images = read_training_images(images, model.generator)
        if recipe not in RECIPES:
            raise UsageError(f"recipe is {recipe!r}; choose one of {', '.join(RECIPES)}.")
        self.model, self.name, self.settings = model, recipe, settings
        self.recipe = RECIPES[recipe]
        if self.recipe.energy == "attributes" and values is None:
            raise UsageError(f"recipe {recipe} learns attributes, so images must have some.")
        self.images, self.values = images * 2.0 - 1.0, values
        self.device = next(model.generator.parameters()).device
        learns = ("energy",) if self.recipe.given else tuple(model.networks)
        self.learning = {name: model.networks[name] for name in learns}
        decay = get_ema_multi_avg_fn(settings.average)
        self.averaged = {n: AveragedModel(m, multi_avg_fn=decay) for n, m in self.learning.items()}
        rates = {"energy": settings.energy_lr}
        self.optimisers = {
            name: torch.optim.Adam(network.parameters(), lr=rates.get(name, settings.lr))
            for name, network in self.learning.items()
        }
        self.history: list[Update] = []

    @property
    def done(self) -> int:
        """Updates taken so far."""
        return len(self.history)

    @property
    def kept(self) -> Model:
        """The model of the running averages of what learns, and of what was given."""
        averaged: dict[str, nn.Module] = {n: a.module for n, a in self.averaged.items()}
        return Model(**(self.model.networks | averaged))  # type: ignore[arg-type]

    def purifier(self) -> LatentPath:
        """Return what purifies with what has been learned."""
        return self.recipe.purifier(self.kept, self.settings)

    def draws(self, update: int, count: int) -> Draws:
        """Return the random numbers of an update of so many places; below 0 for pictures."""
        return Draws(
            seed=self.settings.seed,
            update=update,
            places=tuple(range(count)),
            batch=count,
            device=self.device,
        )

    def samples(self, count: int) -> Tensor:
        """Draw images `[count, C, H, W]` in [-1, 1] of what has been learned."""
        with torch.no_grad():
            return self.recipe.samples(self.kept, self.draws(-1, count), self.settings)

    def run(self) -> Iterator[Update]:
        """Update until the number is reached, yielding each update's losses.

        Raises:
            DivergedError: a loss is NaN or beyond 10⁶; the weights are as they were before it.
        """
        while self.done < self.settings.updates:
            yield self._update()

    def _update(self) -> Update:
        draws = self.draws(self.done, self.settings.batch)
        batch = batch_of(self.images, draws)
        if self.values is not None:
            values = batch_of(self.values, draws).images
            batch = Labelled(images=batch.images, draws=draws, values=values)
        losses = self.recipe.losses(self.model, batch, self.settings)
        update = Update(self.done + 1, {name: float(v.detach()) for name, v in losses.items()})
        if not all(abs(value) < LIMIT for value in update.losses.values()):
            raise DivergedError(
                f"learning diverged at update {update.number}: {update.losses}; lower the learning "
                "rates or step sizes, and resume from the last checkpoint."
            )
        self._descend(losses)
        self.history.append(update)
        return update

    def _descend(self, losses: Losses) -> None:
        """Move each network by the gradient of its own loss, all taken before any moves."""
        for name, loss in losses.items():
            weights = list(self.learning[name].parameters())
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = gradient
        for name in losses:
            self._step(name)

    def _step(self, name: str) -> None:
        network, optimiser = self.learning[name], self.optimisers[name]
        torch.nn.utils.clip_grad_norm_(network.parameters(), self.settings.clip)
        rise = 0.5 * (1.0 + math.cos(math.pi * self.done / self.settings.updates))
        for group in optimiser.param_groups:
            group["lr"] = rise * (self.settings.energy_lr if name == "energy" else self.settings.lr)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        self.averaged[name].update_parameters(network)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        state: dict[str, Any] = {"about": self._about(), "history": [*map(tuple, self.history)]}
        for name, network in self.learning.items():
            state[name] = {
                "network": network.state_dict(),
                "averaged": self.averaged[name].state_dict(),
                "optimiser": self.optimisers[name].state_dict(),
            }
        save_state(path, state)

    def _about(self) -> dict[str, Any]:
        shapes = {name: str(about(network)) for name, network in self.model.networks.items()}
        return {"recipe": self.name, "seed": self.settings.seed, **shapes}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            UsageError: a missing or damaged checkpoint, or one of other networks, recipe or seed.
        """
        state = load_plain(path, self.device)
        refuse_another(state, self._about(), path)
        try:
            for name, network in self.learning.items():
                network.load_state_dict(state[name]["network"])
                self.averaged[name].load_state_dict(state[name]["averaged"])
                self.optimisers[name].load_state_dict(state[name]["optimiser"])
            self.history = [Update(*row) for row in state["history"]]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is no checkpoint of these networks and recipe: {error}"
            ) from error
