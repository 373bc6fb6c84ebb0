"""Attacks that show the judge nothing but their last images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import (
    DirectCall,
    Judge,
    Proposal,
    attack_replicates,
    lenient,
)
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.noise import chain_keys


class Crafted(NamedTuple):
    """Attacked images `[b, C, H, W]`, and the Langevin steps that they cost, all together."""

    images: Tensor
    chain_steps: int = 0


class OneShotAttack(DirectCall):
    """An attack that makes its images in one piece: a subclass overrides `craft`.

    The images are projected onto the threat model, then seen once through `replicates` fresh
    purifications each.
    """

    threat: ThreatModel
    replicates: int

    @property
    def looks(self) -> int:
        return 1

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        """Return the Langevin steps of the query of an image; a subclass adds its making."""
        return len(attack_replicates(self.replicates, defense)) * defense.purifier.chain_steps

    def craft(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
    ) -> Crafted:
        """Attack `images` `[b, C, H, W]`, b ≥ 1."""
        raise NotImplementedError

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
        if not len(images):
            return images.clone()
        defense.check_deterministic(images)
        crafted = self.craft(defense, images, labels, ids=ids, seed=seed)
        x = self.threat.project(crafted.images.detach().to(images), images)
        keys = chain_keys(seed, "final look", ids, attack_replicates(self.replicates, defense))
        with torch.no_grad():
            logits = defense.replicate_logits(x, keys)
        cost = crafted.chain_steps + keys.numel() * defense.purifier.chain_steps
        judge(Proposal(0, torch.arange(len(x)), x, logits, chain_steps=cost))
        return x
