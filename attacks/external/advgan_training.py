"""Training AdvGAN's generator against a defense (Xiao et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.attacks.external.advgan import Generator, GeneratorSettings, within
from ebm_defense.attacks.gradients.base import Gradient, Identity
from ebm_defense.attacks.model_checks import classes_of
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import as_defense
from ebm_defense.errors import UsageError
from ebm_defense.interface.inputs import read_training_data
from ebm_defense.interface.modes import evaluating
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.noise import chain_keys, derive_seed
from ebm_defense.storage.files import load_plain, save_state


@dataclass(frozen=True, kw_only=True)
class CarliniWagner:
    """The margin max_{i≠y} z_i − z_y of mean logits, counted up to `confidence`
    (Carlini, Wagner 2017); beyond it a broken image weighs no more.
    """

    confidence: float = 5.0

    def __post_init__(self) -> None:
        plain_numbers(self)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        mean = logits.mean(0)
        right = nn.functional.one_hot(labels, mean.shape[-1]).bool()
        other = mean.masked_fill(right, -float("inf")).amax(-1)
        return (other - mean[right]).clamp(max=self.confidence)


@dataclass(frozen=True, kw_only=True)
class AdvGANRecipe:
    """How a generator is trained: adversarial + α·GAN + β·hinge, all minimised.

    Attributes:
        updates: steps of generator and discriminator.
        batch: images a step.
        lr: Adam's learning rate for both.
        gan_weight: α, how much the images shall look unattacked to the discriminator.
        hinge_weight: β, how strongly ‖δ‖₂ above the bound is held down, before δ is projected.
        bound: that bound, in [0, 1] units; the largest ‖δ‖₂ that the threat allows if not given.
        confidence: the margin at which an image counts as broken well enough.
        replicates: purifications an image and step.
        width: channels of the generator's first layer, a multiple of 4.
        seed: seed of every draw.
    """

    updates: int = 2_000
    batch: int = 64
    lr: float = 1e-3
    gan_weight: float = 0.1
    hinge_weight: float = 1.0
    bound: float | None = None
    confidence: float = 5.0
    replicates: int = 2
    width: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if min(self.updates, self.batch, self.replicates) < 1 or not self.lr > 0:
            raise UsageError("updates, batch and replicates must be at least 1 and lr above 0.")
        if min(self.gan_weight, self.hinge_weight) < 0 or (self.bound or 0.0) < 0:
            raise UsageError("gan_weight, hinge_weight and bound must be 0 or more.")


class Update(NamedTuple):
    """One update: the three losses, and the share of the batch that was classified wrongly."""

    number: int
    margin: float
    gan: float
    hinge: float
    fooled: float


class AdvGANTrainer:
    """Trains a generator; iterate `run()`, which gives `Update`s.

    Args:
        defense: what is attacked: a defense or any classifier of [0, 1] images.
        images: training images `[N, C, H, W]` in [0, 1], as `read_training_data` takes them.
        labels: their classes `[N]`; None where `images` is a data set or a data loader.
        threat: what may change.
        recipe: all settings.
        gradient: how the defense is differentiated.

    Raises:
        UsageError: images outside [0, 1] or NaN, labels unlike them, or none.
    """

    def __init__(
        self,
        defense: Callable[[Tensor], Tensor],
        images: Any,
        labels: Any,
        threat: ThreatModel,
        recipe: AdvGANRecipe,
        gradient: Gradient | None = None,
    ) -> None:
        self.defense = as_defense(defense)
        images, labels = read_training_data(images, labels, self.defense.classifier)
        with evaluating(self.defense):
            classes_of(self.defense, images, labels)
        self.images, self.labels = images, labels
        self.threat, self.recipe, self.gradient = threat, recipe, gradient or Identity()
        settings = GeneratorSettings(channels=images.shape[1], width=recipe.width)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(recipe.seed, "advgan weights"))
            self.generator = Generator(settings).to(images.device)
            self.discriminator = _discriminator(settings).to(images.device)
        self.bound = _largest(threat, images) if recipe.bound is None else recipe.bound
        self.history: list[Update] = []
        betas = (0.5, 0.999)
        self.optimisers = [
            torch.optim.Adam(module.parameters(), lr=recipe.lr, betas=betas)
            for module in (self.generator, self.discriminator)
        ]

    @property
    def done(self) -> int:
        """Updates taken so far."""
        return len(self.history)

    def run(self) -> Iterator[Update]:
        """Update until the recipe's number is reached, yielding each update."""
        while self.done < self.recipe.updates:
            self.history.append(self._update(self.done + 1))
            yield self.history[-1]

    def _update(self, number: int) -> Update:
        rows = self._rows(number)
        images, labels = self.images[rows], self.labels[rows]
        raw = self.generator.unbounded(images, self.threat)
        attacked = within(images, raw, self.threat)
        self._discriminate(images, attacked.detach())
        margin, rise, fooled = self._attack(attacked, labels, rows, number)
        gan = (self.discriminator(attacked) - 1.0).square().mean()
        hinge = (raw.flatten(1).norm(dim=1) - self.bound).relu().mean()
        loss = -rise + self.recipe.gan_weight * gan + self.recipe.hinge_weight * hinge
        _descend(self.optimisers[0], loss)
        return Update(number, margin, float(gan.detach()), float(hinge.detach()), fooled)

    def _rows(self, number: int) -> Tensor:
        """Draw a batch as a function of (seed, update), so that a resumed run sees the same."""
        seed = derive_seed(self.recipe.seed, f"advgan batch {number}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.images), generator=generator)
        return order[: self.recipe.batch].to(self.images.device)

    def _attack(
        self, attacked: Tensor, labels: Tensor, rows: Tensor, number: int
    ) -> tuple[float, Tensor, float]:
        """Return the mean margin, a term with its gradient, and the share classified wrongly."""
        loss = CarliniWagner(confidence=self.recipe.confidence)
        replicates = attack_replicates(self.recipe.replicates, self.defense)
        seed = derive_seed(self.recipe.seed, f"advgan noise {number}")
        keys = chain_keys(seed, "advgan", rows.tolist(), replicates)
        estimate = self.gradient(self.defense, attacked.detach(), labels, keys, loss)
        rise = (attacked * estimate.gradient).flatten(1).sum(1).mean()
        wrong = self.defense.combine(estimate.logits).argmax(-1) != labels
        return float(loss(estimate.logits, labels).mean()), rise, float(wrong.float().mean())

    def _discriminate(self, real: Tensor, made: Tensor) -> None:
        loss = (self.discriminator(real) - 1.0).square().mean()
        _descend(self.optimisers[1], loss + self.discriminator(made).square().mean())

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        state: dict[str, Any] = {
            "about": {"seed": self.recipe.seed},
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "history": torch.tensor([list(u) for u in self.history], dtype=torch.float64),
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`; a `UsageError` if it is of another network or seed."""
        state = load_plain(path)
        refuse_another(state, {"seed": self.recipe.seed}, path)
        try:
            self.generator.load_state_dict(state["generator"])
            self.discriminator.load_state_dict(state["discriminator"])
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            self.history = [Update(int(n), *rest) for n, *rest in state["history"].tolist()]
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no checkpoint of this generator: {error}") from error


def _discriminator(settings: GeneratorSettings) -> nn.Module:
    """Least-squares discriminator of small patches, for images of any size."""
    width = settings.width
    return nn.Sequential(
        nn.Conv2d(settings.channels, width, 4, 2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 3, padding=1),
    )


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _largest(threat: ThreatModel, images: Tensor) -> float:
    """Return the largest ‖δ‖₂ within a threat model."""
    full = threat.eps * math.sqrt(images[0].numel())
    return full if threat.norm == "Linf" else threat.eps
