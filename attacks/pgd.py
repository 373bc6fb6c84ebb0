"""Projected gradient ascent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebm_defense.attacks.base import DirectCall, Judge, Proposal, attack_replicates, lenient
from ebm_defense.attacks.gradients import Gradient, Identity
from ebm_defense.attacks.losses import CrossEntropy, Loss
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys


@dataclass(frozen=True, kw_only=True)
class PGD(DirectCall):
    """Projected gradient ascent (Madry et al. 2018) on a loss over replicates (EOT).

    With its defaults the BPDA+EOT attack of Hill, Mitchell, Zhu (2021).

    Attributes:
        threat: what may change.
        steps: gradient steps, 0 or more; 0 proposes the start alone.
        step_size: length of a step in the threat's norm, above 0, in [0, 1] units.
        replicates: purifications an image and step, at least 1.
        gradient: how the defense is differentiated.
        loss: what is maximised.
        random_start: start at a random point of the ball, not at the image.
    """

    threat: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 50
    step_size: float = 2 / 255
    replicates: int = 15
    gradient: Gradient = field(default_factory=Identity)
    loss: Loss = field(default_factory=CrossEntropy)
    random_start: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or self.replicates < 1:
            raise UsageError(
                "an attack needs steps ≥ 0 and replicates ≥ 1, not "
                f"{self.steps} and {self.replicates}."
            )
        if not self.step_size > 0:
            raise UsageError(f"an attack's step_size must be above 0, not {self.step_size}.")

    @property
    def name(self) -> str:
        return f"PGD-{self.steps}"

    @property
    def direct(self) -> PGD:
        return self

    @property
    def looks(self) -> int:
        return self.steps + 1

    def chain_steps(self, defense: PurifiedClassifier) -> int:
        draws = len(attack_replicates(self.replicates, defense))
        last = draws * defense.purifier.chain_steps
        return self.steps * draws * self.gradient.chain_steps(defense) + last

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
        x = self._start(images, ids, seed)
        rows = torch.arange(len(images))
        for step in range(self.steps + 1):
            if not len(rows):
                break
            keys = chain_keys(
                seed,
                f"attack step {step}",
                [ids[i] for i in rows.tolist()],
                attack_replicates(self.replicates, defense),
            )
            if step == self.steps:
                with torch.no_grad():
                    logits = defense.replicate_logits(x[rows], keys)
                judge(Proposal(step, rows, x[rows], logits))
                break
            look = self.gradient(defense, x[rows], labels[rows], keys, self.loss)
            stands = judge(Proposal(step, rows, x[rows], look.logits))
            rows, gradient = rows[stands], look.gradient[stands]
            x[rows] = self.threat.step(x[rows], images[rows], gradient, self.step_size)
        return x

    def _start(self, images: Tensor, ids: Sequence[int], seed: int) -> Tensor:
        if not self.random_start:
            return images.clone()
        keys = chain_keys(seed, "random start", ids, range(1))[0]
        return self.threat.random_start(images, KeyedNoise(keys.to(images.device)))
