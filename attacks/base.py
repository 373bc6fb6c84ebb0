"""What every attack is: a proposer of images, told by a judge which are still worth the effort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_defense.attacks.model_checks import classes_of, needs_gradient, refuse_without_slope
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.interface.inputs import read_batch
from ebm_defense.interface.modes import Try, evaluating
from ebm_defense.interface.numbers import whole


class Proposal(NamedTuple):
    """Images put before the judge.

    Attributes:
        step: the attack step they come from; 0 is the start.
        rows: which images of the batch these are, `[b]`.
        images: `[b, C, H, W]` in [0, 1].
        logits: the defense's replicate logits on them as the attack saw them, `[r, b, classes]`.
        blind: on which of them the gradient was NaN or infinite, bool `[b]`; None without one.
        chain_steps: Langevin steps that making and seeing them cost, all images together; None for
            those of the logits alone.
    """

    step: int
    rows: Tensor
    images: Tensor
    logits: Tensor
    blind: Tensor | None = None
    chain_steps: int | None = None


def cost(proposal: Proposal, defense: PurifiedClassifier) -> int:
    """Return the Langevin steps that a proposal cost."""
    if proposal.chain_steps is not None:
        return proposal.chain_steps
    return len(proposal.logits) * len(proposal.rows) * defense.purifier.chain_steps


Judge = Callable[[Proposal], Tensor]
"""Tells which of the proposed images still stand, bool `[b]`; the attack may drop the others."""


def lenient(proposal: Proposal) -> Tensor:
    """Judge that never takes an image off: the attack runs to its end on all."""
    return torch.ones(len(proposal.rows), dtype=torch.bool, device=proposal.rows.device)


class Attack(Protocol):
    """One attack: a frozen value whose `run` proposes images until its budget is spent."""

    @property
    def threat(self) -> ThreatModel: ...

    @property
    def name(self) -> str:
        """A short name for tables."""
        ...

    @property
    def direct(self) -> Attack:
        """The attack to make on a model without a defense, beside this one."""
        ...

    @property
    def looks(self) -> int:
        """How many times an image that stands to the end is put before the judge."""
        ...

    @property
    def replicates(self) -> int:
        """Purifications an image and query."""
        ...

    @property
    def open_ended(self) -> bool:
        """Whether it may cost more than `chain_steps` says, and nobody knows how much."""
        ...

    @property
    def least_classes(self) -> int:
        """How few classes a model may tell apart."""
        ...

    @property
    def models(self) -> tuple[PurifiedClassifier, ...]:
        """Models besides the defense on which the attacked images depend."""
        ...

    def check(self, defense: PurifiedClassifier, images: Tensor, classes: int) -> None:
        """Refuse at once what the attack cannot attack; see `DirectCall.check`."""
        ...

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        """Return the Langevin steps that an image costs which stands to the end."""
        ...

    def run(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
        judge: Judge = lenient,
    ) -> Tensor:
        """Attack `images` `[b, C, H, W]` and return the last iterates.

        Args:
            defense: what is attacked.
            images: originals in [0, 1].
            labels: true classes `[b]`.
            ids: the images' own numbers, on which their noise depends.
            seed: the run's seed.
            judge: gets every proposal, and tells which images still stand.
        """
        ...


class DirectCall:
    """Gives an attack a plain call, `attack(model, images, labels, seed=0)`, and a known cost."""

    @property
    def open_ended(self) -> bool:
        return False

    @property
    def least_classes(self) -> int:
        """How few classes a model may tell apart: what the loss needs."""
        return int(getattr(getattr(self, "loss", None), "classes", 2))

    @property
    def models(self) -> tuple[PurifiedClassifier, ...]:
        """Models besides the defense on which the attacked images depend."""
        return ()

    def check(self, defense: PurifiedClassifier, images: Tensor, classes: int) -> None:
        """Refuse at once what this attack cannot attack; nothing long is run.

        Args:
            defense: what is to be attacked.
            images: originals `[b, C, H, W]` in [0, 1], b ≥ 1.
            classes: how many the defense tells apart.

        Raises:
            UsageError: images or an eps that do not fit the threat model, too few classes for the
                loss, or no gradient where one is needed.
        """
        attack: Attack = self  # type: ignore[assignment]
        attack.threat.check(images)
        if classes < self.least_classes:
            raise UsageError(
                f"{attack.name} needs a model of {self.least_classes} classes or more, and this "
                f"one has {classes}; take another loss, such as Margin()."
            )
        attack.chain_steps(defense)  # where there is no way back, this says so
        if needs_gradient(getattr(attack, "gradient", None)):
            refuse_without_slope(defense, images[:1])

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Any,
        labels: Any = None,
        *,
        seed: int = 0,
    ) -> Tensor:
        """Attack any classifier and return the last iterates `[N, C, H, W]`.

        Args:
            model: any classifier of [0, 1] images.
            images: `[N, C, H, W]` in [0, 1], as `read_batch` takes them.
            labels: true classes `[N]`; None where `images` is a data set or a data loader.
            seed: of all noise.

        Raises:
            UsageError: images outside [0, 1] or NaN, labels that do not fit, or what `check`
                refuses.
        """
        images, labels = read_batch(images, labels)
        attack: Attack = self  # type: ignore[assignment]
        defense = as_defense(model)
        with evaluating(defense, self, trying=trying([defense, *attack.models], images)):
            if len(images):
                self.check(defense, images, classes_of(defense, images, labels))
                defense.check_deterministic(images, again=True)
            ids, number = range(len(images)), whole(seed, "the seed")
            return attack.run(defense, images, labels, ids=ids, seed=number)


def trying(defenses: Sequence[PurifiedClassifier], images: Tensor) -> Try:
    """Return what uses every part of some defenses once, briefly; for `evaluating`."""

    def try_all(number: int) -> None:
        for defense in defenses:
            with suppress(Exception):  # it is refused in a sentence later on
                defense.try_out(images, number)

    return try_all


def attack_replicates(replicates: int, defense: PurifiedClassifier) -> range:
    """Return the replicates an attack draws: one where they were checked to be all the same."""
    return range(replicates if defense.stochastic else 1)
