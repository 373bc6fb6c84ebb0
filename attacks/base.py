"""What every attack is: a proposer of images, told by a judge which are still worth the effort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.images import check_images, check_labels


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

    def __call__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        seed: int = 0,
    ) -> Tensor:
        """Attack any classifier and return the last iterates `[N, C, H, W]`.

        Raises:
            UsageError: images outside [0, 1] or NaN, or labels that do not fit.
        """
        check_images(images)
        check_labels(labels, images)
        run = self.run  # type: ignore[attr-defined]
        result: Tensor = run(as_defense(model), images, labels, ids=range(len(images)), seed=seed)
        return result


def attack_replicates(replicates: int, defense: PurifiedClassifier) -> range:
    """Return the replicates an attack draws: one where they would all be the same."""
    return range(replicates if defense.purifier.stochastic else 1)
