"""Attack the shipped defenses at their input, through every step of their chains.

PGD on cross-entropy and on margin, with fresh noise at every step; an image counts as robust if it
stands under both. Prints the table that README and model cards quote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from common import Options, Result, main
from torch import Tensor

from ebm_defense.attacks.training import InputPerturbation
from ebm_defense.data import load_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.judging.statistics import mcnemar, share
from ebm_defense.learning.batches import generator_of
from ebm_defense.learning.chain import LearnedChain
from ebm_defense.learning.objectives import cross_entropy, margin
from ebm_defense.noise import GeneratorNoise, chain_keys
from ebm_defense.storage.files import save_state
from ebm_defense.storage.weights import load_defense

CONTROL = "fashion-mnist-adversarial"
LOSSES = {"CE": cross_entropy, "margin": margin}
BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Defenses(Options):
    """Clean and robust accuracy of defenses on the same images."""

    defenses: tuple[str, ...] = (
        "fashion-mnist",
        "fashion-mnist-together",
        "fashion-mnist-adversarial",
        "fashion-mnist-gaussian",
    )
    """Shipped names or folders."""
    data: str = "fashion-mnist"
    """Data set, of which the test split is attacked."""
    images: int = 500
    """How many images are attacked, a stratified sample."""
    clean: int = 1000
    """How many images clean accuracy is measured on."""
    eps: float = 0.1
    """Largest Linf perturbation, in [0, 1] units."""
    steps: int = 20
    """Steps of PGD, each of 1.5·eps/steps, after a random start."""
    replicates: int = 2
    """Attack replicates a step."""
    draws: int = 32
    """Fresh draws that judge by their mean logits."""

    def run(self) -> Result:
        """Attack and compare."""
        rows, stood = [], {}
        for name in self.defenses:
            clean, robust = self._measure(name)
            stood[name] = robust
            rows.append([name, _said(clean), _said(robust), len(robust)])
            print(*rows[-1], flush=True)
        for row in rows:
            other = stood.get(CONTROL)
            paired = other is not None and row[0] != CONTROL
            row.append(_p(stood[str(row[0])], other) if paired else "–")
        columns = ["defense", "clean", "worst of PGD on CE and margin", "images", "p against it"]
        table = pd.DataFrame(rows, columns=columns).to_markdown(index=False)
        return Result("defenses", f"{table}\n\n{self._caption()}", self.images * len(rows))

    def _caption(self) -> str:
        size = f"{1.5 * self.eps / self.steps:g}"
        return (
            f"Accuracy in % and its 95% Wilson interval, test images. Linf {self.eps:g}; "
            f"PGD-{self.steps} on cross-entropy and on margin, steps of {size}, random start, the "
            "gradient through the whole chain (bf16 where native), "
            f"{self.replicates} fresh replicates a step; the last iterates are judged once, by the "
            f"mean logits of {self.draws} fresh draws. Clean on {self.clean} images. p: McNemar's "
            f"exact test against {CONTROL} on the same images. Seed {self.seed}."
        )

    def _measure(self, name: str) -> tuple[Tensor, Tensor]:
        defense = load_defense(name, seed=self.seed).requires_grad_(False)
        many = load_data(self.data, "test", self.clean)
        clean = self._right(defense, many.images, many.labels, "clean")
        images, labels = load_data(self.data, "test", self.images)
        stands = torch.ones_like(labels, dtype=torch.bool)
        for loss in LOSSES:
            attacked = torch.cat(
                [
                    self._attack(defense, x, y, loss, f"{loss} {i}")
                    for i, (x, y) in enumerate(
                        zip(images.split(BATCH), labels.split(BATCH), strict=True)
                    )
                ]
            )
            save_state(Path(self.out) / f"{Path(name).name}-{loss}.pt", {"images": attacked})
            stands &= self._right(defense, attacked, labels, loss)
        return clean, stands

    def _attack(
        self, defense: PurifiedClassifier, x: Tensor, y: Tensor, loss: str, purpose: str
    ) -> Tensor:
        generator = generator_of(self.seed, f"attack {purpose}")
        return InputPerturbation()(
            _predict(defense, self.replicates, generator), x, y,
            eps=self.eps, steps=self.steps, loss=LOSSES[loss], generator=generator,
        )  # fmt: skip

    def _right(
        self, defense: PurifiedClassifier, images: Tensor, labels: Tensor, purpose: str
    ) -> Tensor:
        draws = range(self.draws if defense.purifier.stochastic else 1)
        keys = chain_keys(self.seed, f"judge {purpose}", range(len(images)), draws)
        found = [
            defense.combine(defense.verdict_logits(x, k)).argmax(-1)
            for x, k in zip(images.split(BATCH), keys.split(BATCH, dim=1), strict=True)
        ]
        return torch.cat(found) == labels


def _predict(
    defense: PurifiedClassifier, replicates: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    purifier, noise = defense.purifier, GeneratorNoise(generator)
    settings, energy = getattr(purifier, "settings", None), purifier.networks.get("energy")
    if energy is not None and settings is not None:
        purifier = LearnedChain(energy, settings, precision="fastest")
    count = replicates if purifier.stochastic else 1

    def predict(images: Tensor) -> Tensor:
        purified = purifier.purify(images.repeat(count, 1, 1, 1), noise)
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            logits = defense.classifier(purified.contiguous(memory_format=torch.channels_last))
        return logits.float().view(count, len(images), -1).mean(0)

    return predict


def _p(first: Tensor, second: Tensor | None) -> str:
    assert second is not None
    return f"{mcnemar(int((first & ~second).sum()), int((second & ~first).sum())):.3g}"


def _said(right: Tensor) -> str:
    found = share(int(right.sum()), len(right))
    return f"{100 * found.value:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


if __name__ == "__main__":
    sys.exit(main(Defenses))
