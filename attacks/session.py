"""What every attack does at every step: look through keyed noise, and hear the judge."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import Judge, Proposal, attack_replicates
from ebm_defense.attacks.gradients.base import Gradient, GradientEstimate
from ebm_defense.attacks.losses import Loss
from ebm_defense.attacks.threat import per_image
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys

LOG = logging.getLogger("ebm_defense.attacks")


class QueryResult(NamedTuple):
    """What a look showed of the images that still stand after it.

    Attributes:
        stands: which of the images looked at still stand, bool on the images' device.
        loss: `[b]`.
        gradient: of the loss, `[b, C, H, W]`; zero where none was asked for, and where it was NaN
            or infinite.
        logits: `[r, b, classes]`.
    """

    stands: Tensor
    loss: Tensor
    gradient: Tensor
    logits: Tensor


class AttackSession:
    """One run of an attack before a judge: its noise, the images that stand, what it found.

    Looks are numbered, and the noise of a look depends on its number and on the image alone. So
    an attack gives the same images whatever the batch, as long as the looks that it takes do not
    depend on the other images.

    Args:
        defense: what is attacked.
        images: originals `[n, C, H, W]` in [0, 1].
        labels: true classes `[n]`.
        ids: the images' own numbers.
        seed: the run's seed.
        judge: hears every look.
        replicates: purifications an image and look, where the defense is random.

    Attributes:
        rows: the images that still stand, `[b]`.
        looks: how many looks were taken.
        found: `[n, C, H, W]`: the images that the judge struck, else the best that were kept, else
            the originals.
    """

    def __init__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
        judge: Judge,
        replicates: int,
    ) -> None:
        self.defense, self.seed, self.judge = defense, seed, judge
        self.replicates = attack_replicates(replicates, defense)
        self._images, self._labels, self._ids = images, labels, ids
        self.rows = torch.arange(len(images))
        self.looks = 0
        self.found = images.clone()
        self._wrong = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self._loss = images.new_full((len(images),), -torch.inf)
        self._warned = False

    @property
    def over(self) -> bool:
        """Whether no image stands any more."""
        return not len(self.rows)

    @property
    def random(self) -> bool:
        """Whether the defense answers twice differently."""
        return self.defense.purifier.stochastic

    @property
    def originals(self) -> Tensor:
        """The images that still stand, unperturbed, `[b, C, H, W]`."""
        return self._images[self.rows]

    @property
    def labels(self) -> Tensor:
        """The true classes of the images that still stand, `[b]`."""
        return self._labels[self.rows]

    def noise(self, purpose: str) -> KeyedNoise:
        """Return noise of the attacker's own for the images that still stand."""
        keys = chain_keys(self.seed, purpose, self._standing_ids(), range(1))[0]
        return KeyedNoise(keys.to(self._images.device))

    def query(self, x: Tensor, loss: Loss, gradient: Gradient | None = None) -> QueryResult:
        """Look at `x` `[b, C, H, W]`, in place of the images that still stand, and be judged.

        Raises:
            UsageError: the defense returned logits that are not finite.
        """
        purpose = f"attack step {self.looks}"
        keys = chain_keys(self.seed, purpose, self._standing_ids(), self.replicates)
        if gradient is None:
            with torch.no_grad():
                look = GradientEstimate(torch.zeros_like(x), self.defense.replicate_logits(x, keys))
        else:
            look = gradient(self.defense, x, self.labels, keys, loss)
        refuse_nan(look.logits, self._standing_ids())
        blind = ~look.gradient.flatten(1).isfinite().all(1)
        self._warn(blind)
        slope = look.gradient.masked_fill(per_image(blind), 0.0)
        with torch.no_grad():
            value = loss(look.logits, self.labels)
        cost = len(self.rows) * self._cost(gradient)
        stands = self.judge(Proposal(self.looks, self.rows, x, look.logits, blind, cost)).cpu()
        self.found[self.rows[~stands]] = x[~stands]
        self.rows, self.looks = self.rows[stands], self.looks + 1
        return QueryResult(stands, value[stands], slope[stands], look.logits[:, stands])

    def keep(self, x: Tensor, seen: QueryResult) -> None:
        """Keep `x`, just seen and still standing, where it is the best so far.

        An image whose replicates are wrong on average beats one whose replicates are right, and
        among equals the higher loss wins.
        """
        rows = self.rows
        wrong = self.defense.combine(seen.logits).argmax(-1) != self.labels
        ahead = wrong & ~self._wrong[rows]
        equal = wrong == self._wrong[rows]
        better = (ahead | (equal & (seen.loss > self._loss[rows]))).cpu()
        self.found[rows[better]] = x[better]
        self._wrong[rows[better]], self._loss[rows[better]] = wrong[better], seen.loss[better]

    def _cost(self, gradient: Gradient | None) -> int:
        """Return the chain-steps of a look at one image."""
        draws = len(self.replicates)
        if gradient is None:
            return draws * self.defense.purifier.chain_steps
        return gradient.chain_steps(self.defense, draws)

    def _standing_ids(self) -> list[int]:
        return [self._ids[i] for i in self.rows.tolist()]

    def _warn(self, blind: Tensor) -> None:
        """Say once that a gradient is none; the judge counts how often."""
        if blind.any() and not self._warned:
            self._warned = True
            LOG.warning(
                "the gradient for image %s is NaN or infinite and counts as 0 there; choose "
                "another gradient or loss, or lower the purifier's step size.",
                _named(blind, self._standing_ids()),
            )


def refuse_nan(logits: Tensor, ids: Sequence[int]) -> None:
    """Refuse replicate logits `[r, b, classes]` that are not finite, naming the images.

    Raises:
        UsageError: some replicate of some image is NaN or infinite.
    """
    bad = ~logits.isfinite().all(-1).all(0)
    if bad.any():
        raise UsageError(
            f"the defense returned NaN or infinite logits for image {_named(bad, ids)}; no verdict "
            "can rest on them: lower the purifier's step size, or check the classifier's weights."
        )


def _named(bad: Tensor, ids: Sequence[int]) -> str:
    return ", ".join(str(ids[i]) for i in bad.nonzero().flatten().tolist()[:10])
