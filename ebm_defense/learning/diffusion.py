"""Learning a denoiser: the simple loss of a diffusion model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_defense.data import Images
from ebm_defense.denoisers.base import Denoiser, diffused
from ebm_defense.errors import FailedRunError, UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.learning.batches import Batches, generator_of
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.learning.defenses.trainer import rising_average
from ebm_defense.storage.files import load_plain, save_state
from ebm_defense.storage.state_dicts import about


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """How a denoiser is learned: ‖ε_θ(√ᾱ_t·x + √(1−ᾱ_t)·ε, t) − ε‖² over all levels t and noise
    ε alike (Ho, Jain, Abbeel 2020, eq. 14), by AdamW.

    Attributes:
        updates: weight updates in all.
        batch: images an update.
        lr: the highest learning rate.
        warmup: the share of all updates over which the rate rises, before a cosine.
        weight_decay: AdamW's.
        clip: the largest norm of a gradient.
        average: decay of the weights' running average, which is kept; it rises to this from 0.
        padding: pixels of a random shift.
        flip: mirror every other image.
        seed: seed of every draw.
    """

    updates: int = 10_000
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    average: float = 0.999
    padding: int = 0
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if min(self.updates, self.batch) < 1 or not (self.lr > 0 and self.clip > 0):
            raise UsageError("updates and batch must be at least 1, lr and clip above 0.")
        if not (0 <= self.warmup < 1 and 0 <= self.average < 1 and self.weight_decay >= 0):
            raise UsageError(
                "warmup and average must lie in [0, 1), and weight_decay be 0 or more."
            )


class Update(NamedTuple):
    """One update's number and mean loss a pixel; 1 is what an estimate of 0 would have."""

    number: int
    loss: float


class DiffusionTrainer:
    """Learns `denoiser` in place; iterate `run()` and look at each `Update`.

    Args:
        denoiser: the network.
        data: training images `[N, C, H, W]` in [0, 1].
        recipe: all settings.

    Raises:
        UsageError: images outside [0, 1], NaN, none, or fewer than a batch.
    """

    def __init__(self, denoiser: Denoiser, data: Images, recipe: DiffusionRecipe) -> None:
        self.denoiser, self.recipe = denoiser, recipe
        self.device = next(denoiser.parameters()).device
        self.batches = Batches(
            data=data, size=recipe.batch, padding=recipe.padding, flip=recipe.flip,
            seed=recipe.seed,
        )  # fmt: skip
        self.averaged = torch.optim.swa_utils.AveragedModel(
            denoiser, multi_avg_fn=rising_average(recipe.average)
        )
        self.optimiser = torch.optim.AdamW(
            denoiser.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.history: list[Update] = []

    @property
    def done(self) -> int:
        """Updates taken so far."""
        return len(self.history)

    def run(self) -> Iterator[Update]:
        """Update until the recipe's number is reached, yielding each update's loss.

        Raises:
            FailedRunError: the loss is no number any more.
        """
        self.denoiser.train()
        while self.done < self.recipe.updates:
            yield self._update()
        self.denoiser.eval()

    def _update(self) -> Update:
        loss = self._loss(self.done)
        found = Update(self.done + 1, float(loss.detach()))
        if not math.isfinite(found.loss):
            raise FailedRunError(
                f"learning diverged at update {found.number}; lower the learning rate, and resume "
                "from the last checkpoint."
            )
        self._schedule()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.averaged.update_parameters(self.denoiser)
        self.history.append(found)
        return found

    def _loss(self, update: int) -> Tensor:
        x = self.batches.at(update).images * 2.0 - 1.0
        generator = generator_of(self.recipe.seed, f"noise {update}")
        level = torch.randint(self.denoiser.levels, (len(x),), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        x, level, noise = (part.to(self.device) for part in (x, level, noise))
        noisy = diffused(x, noise, self.denoiser.alpha(level, x))
        return (self.denoiser(noisy, level) - noise).square().mean()

    def _schedule(self) -> None:
        r, share = self.recipe, self.done / self.recipe.updates
        fall = 0.5 * (1.0 + math.cos(math.pi * (share - r.warmup) / (1.0 - r.warmup)))
        for group in self.optimiser.param_groups:
            group["lr"] = r.lr * ((share + 1 / r.updates) / r.warmup if share < r.warmup else fall)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        state: dict[str, Any] = {
            "about": self._about(),
            "denoiser": self.denoiser.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": torch.tensor([list(u) for u in self.history], dtype=torch.float64),
        }
        save_state(path, state)

    def _about(self) -> dict[str, Any]:
        return {"seed": self.recipe.seed, **about(self.denoiser)}

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`.

        Raises:
            UsageError: a missing or damaged checkpoint, or one of another network or seed.
        """
        state = load_plain(path, "cpu")
        refuse_another(state, self._about(), path)
        try:
            self.denoiser.load_state_dict(state["denoiser"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.history = [Update(int(n), loss) for n, loss in state["history"].tolist()]
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is no checkpoint of this network and recipe: {error}"
            ) from error
