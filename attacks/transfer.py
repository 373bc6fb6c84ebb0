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
from ebm_defense.errors import UsageError
from ebm_defense.noise import chain_keys

SOURCES = {"classifier": "its own classifier", "undefended": "the undefended classifier"}


@dataclass(frozen=True, kw_only=True)
class Transfer(DirectCall):
    """The final iterates of an attack on a bare classifier, put before the defense.

    Attributes:
        attack: the attack on the bare classifier.
        replicates: purifications of each final image before it is judged.
        source: whose images they are, a name in `SOURCES`: "classifier", the defense's own without
            its purifier, or "undefended", the one that reports show as undefended.
    """

    attack: Attack = field(default_factory=PGD)
    replicates: int = 15
    source: str = "classifier"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UsageError(
                f"transfer comes from {' or '.join(SOURCES)}, not from {self.source!r}."
            )
        if self.replicates < 1:
            raise UsageError(f"replicates must be at least 1, not {self.replicates}.")

    @property
    def threat(self) -> ThreatModel:
        return self.attack.threat

    @property
    def name(self) -> str:
        return f"transfer {self.attack.name} from {SOURCES[self.source]}"

    @property
    def direct(self) -> Attack:
        return self.attack.direct

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
        bare = as_defense(getattr(defense, self.source))
        x = self.attack.run(bare, images, labels, ids=ids, seed=seed)
        keys = chain_keys(seed, "transfer look", ids, attack_replicates(self.replicates, defense))
        with torch.no_grad():
            logits = defense.replicate_logits(x, keys)
        judge(Proposal(0, torch.arange(len(x)), x, logits))
        return x
