"""Learning a classifier, on images as they are or as a purifier leaves them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.errors import UsageError
from ebm_defense.interface.images import PURIFIED, check_images, check_labels
from ebm_defense.interface.inputs import read_labels, read_training_data
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.interface.outputs import logits_of, told
from ebm_defense.learning.batches import augmented
from ebm_defense.learning.checkpoints import refuse_another
from ebm_defense.precision.names import resolve_precision
from ebm_defense.storage.files import load_plain, save_state

Copies = Callable[[int], Tensor]
"""copy number → the training images as the classifier shall see them, `[N, C, H, W]` in [0, 1]."""


Perturb = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
"""(classifier, images, labels, generator) → images to train on: adversarial training."""


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """How a classifier is learned: SGD with momentum, one rise and a cosine fall of the rate.

    Attributes:
        epochs: passes over the images.
        batch: images a step.
        lr: the highest learning rate.
        warmup: the share of all steps over which the rate rises.
        momentum, weight_decay: SGD's.
        padding: pixels of a random shift; 0 for none.
        flip: mirror every other image.
        copies: how many differently purified copies of the images the epochs cycle through.
        seed: seed of every draw.
    """

    epochs: int = 30
    batch: int = 100
    lr: float = 0.1
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 2e-4
    padding: int = 4
    flip: bool = True
    copies: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        plain_numbers(self)
        if min(self.epochs, self.batch, self.copies) < 1 or not self.lr > 0:
            raise UsageError("epochs, batch and copies must be at least 1 and lr above 0.")
        if not 0 <= self.warmup < 1 or self.padding < 0:
            raise UsageError("warmup must lie in [0, 1) and padding be 0 or more.")


class Epoch(NamedTuple):
    """One epoch's mean loss and accuracy on the (augmented) training images."""

    number: int
    loss: float
    accuracy: float


class ClassifierTrainer:
    """Learns `classifier` in place; iterate `run()` and look at each `Epoch`.

    Args:
        classifier: on [0, 1] images.
        images: `[N, C, H, W]` in [0, 1], as `read_training_data` takes them, or a function from the
            number of a copy to them.
        labels: true classes `[N]`; None where `images` is a data set or a data loader.
        recipe: all settings.
        precision: of the network's inner activations, one of `PRECISIONS`; "fastest" is
            bf16 where it is native, unchecked: accuracy shows what it costs.
        perturb: changes every batch before it is learned, for adversarial training.

    Raises:
        UsageError: images outside [0, 1] or NaN, labels unlike them, none, or such as the
            classifier cannot take.
    """

    def __init__(
        self,
        classifier: nn.Module,
        images: Any,
        labels: Any,
        recipe: ClassifierRecipe,
        precision: str = "fastest",
        perturb: Perturb | None = None,
    ) -> None:
        if not callable(images):
            images, labels = read_training_data(images, labels, classifier)
            _refuse_unfit(classifier, images, labels)
        self.classifier, self.labels, self.recipe = classifier, read_labels(labels), recipe
        self.copies: Copies = images if callable(images) else lambda _: images
        self.perturb = perturb
        self.device = next(classifier.parameters()).device
        self.bf16 = resolve_precision(precision, self.device, torch.float32) == "bf16"
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.history: list[Epoch] = []
        self.optimiser = torch.optim.SGD(
            classifier.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )

    def run(self) -> Iterator[Epoch]:
        """Train until the recipe's epochs are done, yielding after each."""
        while len(self.history) < self.recipe.epochs:
            self.history.append(self._epoch(len(self.history)))
            yield self.history[-1]

    def _epoch(self, number: int) -> Epoch:
        images = self.copies(number % self.recipe.copies)
        check_images(images, slack=PURIFIED, name="training images")
        check_labels(self.labels, images)
        order = torch.randperm(len(self.labels), generator=self.generator)
        batches = order.split(self.recipe.batch)
        loss, right = 0.0, 0
        self.classifier.train()
        for i, rows in enumerate(batches):
            self._schedule((number + i / len(batches)) / self.recipe.epochs)
            part = self._step(self._augment(images[rows]), self.labels[rows])
            loss, right = loss + part[0], right + part[1]
        self.classifier.eval()
        return Epoch(number + 1, loss / len(order), right / len(order))

    def _step(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        images, labels = images.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            images = self._perturbed(images, labels)
            logits = self.classifier(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return float(loss.detach()) * len(labels), int((logits.argmax(1) == labels).sum())

    def _perturbed(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.perturb is None:
            return images
        self.classifier.eval()  # batch statistics belong to the step that learns
        perturbed = self.perturb(self.classifier, images, labels, self.generator)
        self.classifier.train()
        return perturbed

    def _schedule(self, share: float) -> None:
        r = self.recipe
        fall = 0.5 * (1.0 + math.cos(math.pi * (share - r.warmup) / (1.0 - r.warmup)))
        for group in self.optimiser.param_groups:
            group["lr"] = r.lr * (share / r.warmup if share < r.warmup else fall)

    def _augment(self, x: Tensor) -> Tensor:
        return augmented(x, self.recipe.padding, self.recipe.flip, self.generator)

    def save(self, path: Path) -> None:
        """Write everything that `load` needs to go on exactly, atomically."""
        state = {
            "about": {"seed": self.recipe.seed},
            "classifier": self.classifier.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "history": torch.tensor([list(e) for e in self.history], dtype=torch.float64),
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of `save`; a `UsageError` if it is of another network or seed."""
        state = load_plain(path)
        refuse_another(state, {"seed": self.recipe.seed}, path)
        try:
            self.classifier.load_state_dict(state["classifier"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.generator.set_state(state["generator"])
            self.history = [Epoch(int(n), loss, a) for n, loss, a in state["history"].tolist()]
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no checkpoint of this classifier: {error}") from error


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Return the share of images `[N, C, H, W]` in [0, 1] that the classifier gets right."""
    device = next(classifier.parameters()).device
    right = 0
    with in_eval_mode(modules_of(classifier)):
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            right += int((classifier(x.to(device)).argmax(1).cpu() == y).sum())
    return right / max(len(labels), 1)


def _refuse_unfit(classifier: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Refuse images that a classifier cannot take, or labels beyond its classes, at once."""
    one = images[:1].to(next(classifier.parameters()).device)
    with told(one), torch.no_grad(), in_eval_mode(modules_of(classifier)):
        classes = logits_of(classifier(one), one).shape[1]
    if classes <= (highest := int(labels.max())):
        raise UsageError(
            f"the classifier has {classes} classes, but the labels go up to {highest}."
        )
