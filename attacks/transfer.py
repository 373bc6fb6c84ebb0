"""Attacks made on one model and judged on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebm_defense.attacks.base import (
    Attack,
    DirectCall,
    Judge,
    Proposal,
    attack_replicates,
    lenient,
)
from ebm_defense.attacks.pgd import PGD
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.noise import chain_keys


@dataclass(frozen=True, kw_only=True)
class Transfer(DirectCall):
    """The final iterates of an attack on the bare classifier, put before the defense.

    Attributes:
        attack: the attack on the defense's own classifier without its purifier.
        replicates: purifications of each final image before it is judged.
    """

    attack: Attack = field(default_factory=PGD)
    replicates: int = 15

    @property
    def threat(self) -> ThreatModel:
        return self.attack.threat

    @property
    def name(self) -> str:
        return f"transfer {self.attack.name}"

    @property
    def looks(self) -> int:
        return 1

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        return len(attack_replicates(self.replicates, defense)) * defense.purifier.chain_steps

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
        bare = as_defense(defense.classifier)
        x = self.attack.run(bare, images, labels, ids=ids, seed=seed)
        keys = chain_keys(seed, "transfer look", ids, attack_replicates(self.replicates, defense))
        with torch.no_grad():
            logits = defense.replicate_logits(x, keys)
        judge(Proposal(0, torch.arange(len(x)), x, logits))
        return x
