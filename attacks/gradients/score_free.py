"""A gradient from scores alone, for classifiers and purifiers that have none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ebm_defense.attacks.checks import check_positive
from ebm_defense.attacks.gradients.base import GradientEstimate
from ebm_defense.attacks.losses import Loss
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, working_dtype

BEYOND = 1 << 40  # a step of the keys' noise that no chain reaches


@dataclass(frozen=True, kw_only=True)
class ScoreFree:
    """Simultaneous perturbation (Spall 1992): the mean of v·(L(x+δv) − L(x−δv))/(2δ) over random
    signs v of every pixel and channel.

    It needs no gradient of classifier or purifier. The two losses of a pair share their noise, so
    that their difference does not drown in it; every pair has noise of its own, so that more pairs
    also average more of the defense's randomness.

    Attributes:
        samples: pairs, at least 1; 2,048 to 8,192 losses as published.
        delta: δ > 0, in [0, 1] pixel units; x ± δv may leave [0, 1] by as much.

    Raises:
        UsageError: a setting out of range.
    """

    samples: int = 1024
    delta: float = 0.01

    name: str = field(default="SPSA", init=False)

    through_chain = False
    own_curvature = False
    from_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.samples < 1:
            raise UsageError(f"SPSA needs at least 1 sample, not {self.samples}.")
        check_positive("delta", self.delta)

    def chain_steps(self, defense: PurifiedClassifier, replicates: int = 1) -> int:
        return replicates * (2 * self.samples + 1) * defense.purifier.chain_steps

    def __call__(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
    ) -> GradientEstimate:
        keys = keys.to(images.device)
        total = torch.zeros_like(images, dtype=working_dtype(images.dtype))
        # As many pairs at a time as the defense runs chains at a time.
        pairs = max(1, defense.max_chains // max(keys.numel(), 1))
        with torch.no_grad():
            logits = defense.replicate_logits(images, keys)
            for first in range(0, self.samples, pairs):
                chunk = range(first, min(first + pairs, self.samples))
                signs = torch.stack([_signs(keys, s, total) for s in chunk])
                slopes = self._slopes(defense, images, labels, _keys(keys, chunk), loss, signs)
                total += (slopes * signs).sum(0)
        return GradientEstimate(total / self.samples, logits)

    def _slopes(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        keys: Tensor,
        loss: Loss,
        signs: Tensor,
    ) -> Tensor:
        """Return the slopes `[s, b, 1, 1, 1]` along `signs` `[s, b, C, H, W]`."""

        def losses(step: float) -> Tensor:
            moved = (images + step * signs).flatten(0, 1).to(images.dtype)
            logits = defense.replicate_logits(moved, keys).unflatten(1, signs.shape[:2])
            # A sample at a time, since a targeted loss holds one target an image.
            return torch.stack([loss(sample, labels) for sample in logits.unbind(1)])

        slopes = (losses(self.delta) - losses(-self.delta)) / (2.0 * self.delta)
        return slopes[..., None, None, None]


def _signs(keys: Tensor, sample: int, like: Tensor) -> Tensor:
    """Return the directions of a sample, ±1, shaped as the images `[b, C, H, W]`."""
    own = KeyedNoise(keys[0]).bits(BEYOND, 1)[:, 0]
    uniform = KeyedNoise(own).uniform(sample, like)
    return torch.where(uniform < 0.5, -1.0, 1.0).to(like)


def _keys(keys: Tensor, samples: range) -> Tensor:
    """Return keys `[r, s·b]` of these samples' own, made of `[r, b]`."""
    noise = KeyedNoise(keys.flatten())
    own = [noise.bits(BEYOND + 1 + s, 1).view(keys.shape) for s in samples]
    return torch.cat(own, dim=1)
