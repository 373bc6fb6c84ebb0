"""What makes an energy in front of a natural classifier robust: one lever at a time, at equal cost.

Each row is `ebm-defense train-defense --learn energy` with one thing changed, for the same
processor time, and is judged alike. A row that is kept in OUT is not learned again.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Options, Result, accuracy, main, table
from torch import Tensor, nn

from ebm_defense.attacks.training import InputPerturbation
from ebm_defense.commands.training.train_defense import TrainDefense
from ebm_defense.data import Images, load_data
from ebm_defense.energies.classes import LogSumExpEnergy
from ebm_defense.eval.judging.statistics import mcnemar, share
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.batches import generator_of
from ebm_defense.learning.defenses.chain import LearnedChain
from ebm_defense.learning.defenses.objectives import cross_entropy, margin
from ebm_defense.learning.defenses.trainer import DefenseTrainer
from ebm_defense.learning.energies.trainer import DivergedError
from ebm_defense.noise import GeneratorNoise
from ebm_defense.precision.names import resolve_precision
from ebm_defense.storage.files import load_plain, save_state
from ebm_defense.storage.weights import load_defense

BASELINE = "baseline"
LOSSES = {"CE": cross_entropy, "margin": margin}
BATCH, TIMED = 100, 4


@dataclass(frozen=True, kw_only=True)
class Lever:
    """What differs from the baseline.

    Attributes:
        options: of train-defense.
        classes: a robust defense whose classifier, read as −log Σ_y exp f_y, is the energy.
        learned: whether the energy learns; else it is judged as it is.
    """

    options: dict[str, Any] = field(default_factory=dict)
    classes: str | None = None
    learned: bool = True


LEVERS: dict[str, Lever] = {
    BASELINE: Lever(),
    "K = 6": Lever(options={"langevin_steps": 6}),
    "width 32": Lever(options={"width": 32}),
    "attack of 2 steps": Lever(options={"attack_steps": (2,)}),
    "4 draws in training": Lever(options={"draws": 4}),
    "TRADES, β = 6": Lever(options={"loss": "trades"}),
    "noise 0.1 a step": Lever(options={"step_size": 0.1, "temperature": 0.005}),
    "noise 0.001 a step": Lever(options={"step_size": 0.001, "temperature": 5e-7}),
    "class energy": Lever(classes="fashion-mnist-adversarial"),
    "width 8": Lever(options={"width": 8}),
    "λ = 1e-4": Lever(options={"likelihood": 1e-4}),
    "λ = 1e-2": Lever(options={"likelihood": 1e-2}),
    "generated images": Lever(
        options={
            "augment": "fashion-mnist-longrun",
            "teacher": "fashion-mnist-adversarial",
            "augment_images": 5_000,
        }
    ),
    "K = 10": Lever(options={"langevin_steps": 10}),
    "baseline, seed 1": Lever(options={"seed": 1}),
    "attacks of 1.25 eps": Lever(options={"eps": 0.125}),
    "learned noise": Lever(options={"learn_noise": True}),
    "class energy, not learned, s = 0.3": Lever(
        options={"temperature": 0.05**2 / 0.6},
        classes="fashion-mnist-adversarial",
        learned=False,
    ),
    "class energy, not learned, s = 1": Lever(classes="fashion-mnist-adversarial", learned=False),
    "class energy, not learned, K = 10, s = 0.3": Lever(
        options={"langevin_steps": 10, "temperature": 0.05**2 / 0.6},
        classes="fashion-mnist-adversarial",
        learned=False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Levers(Options):
    """Learn an energy before a natural classifier, one lever at a time, and judge all alike."""

    classifier: str
    """A natural defense, whose classifier stays as it is: a folder, or a shipped name with
    :undefended."""
    only: tuple[str, ...] = tuple(LEVERS)
    """Which levers."""
    seconds: float = 240.0
    """Processor time of each, from which its updates follow."""
    images: int = 500
    """Validation images that judge, a stratified sample."""
    eps: float = 0.1
    """Largest Linf perturbation, in [0, 1] units."""
    steps: int = 10
    """Steps of PGD, each of 1.5·eps/steps, after a random start."""
    replicates: int = 2
    """Attack replicates a step."""
    draws: int = 16
    """Fresh draws that judge by their mean logits."""
    compiled: bool = True
    """Let torch compile the energy's activations."""

    def run(self) -> Result:
        """Learn and compare."""
        judged = load_data("fashion-mnist", "val", self.images)
        shown = table(self._rows(judged))
        return Result("levers", f"{shown}\n\n{self._caption()}", self.images * len(self.only))

    def _rows(self, judged: Images) -> Iterator[dict[str, str]]:
        base: Tensor | None = None
        for name in self.only:
            found = self._found(name, judged)
            robust = found["robust"]
            base = robust if name == BASELINE else base
            yield {
                "lever": name,
                "updates": str(found["updates"]),
                "clean %": f"{100 * float(found['clean'].float().mean()):.1f}",
                **accuracy(share(int(robust.sum()), len(robust))),
                "p": _paired(base, robust) if name != BASELINE else "–",
            }

    def _found(self, name: str, judged: Images) -> dict[str, Any]:
        file = Path(self.out) / f"{list(LEVERS).index(name)}.pt"
        if not file.exists():
            save_state(file, self._measure(name, judged))
        return load_plain(file)

    def _measure(self, name: str, judged: Images) -> dict[str, Any]:
        lever, updates = LEVERS[name], 0
        trainer = self._trainer(lever, 1_000_000)
        if lever.learned:
            updates = max(1, round(self.seconds / _cost(trainer)))
            trainer = self._trainer(lever, updates)
            try:
                while trainer.done < updates:
                    trainer.step()
            except DivergedError as error:
                print(f"{name}: {error}", flush=True)
                updates = trainer.done
        found = _judged(self, trainer, judged)
        return {**found, "updates": updates, "learned": trainer.averaged.module.state_dict()}

    def _trainer(self, lever: Lever, updates: int) -> DefenseTrainer:
        command = TrainDefense(
            **{
                "out": self.out, "classifier": (self.classifier,), "eps": self.eps,
                "attack_steps": (1,), "updates": updates, "compiled": self.compiled,
                "seed": self.seed, "validate_every": updates, **lever.options,
            }
        )  # fmt: skip
        trainer = command._trainer(command.recipe(), torch.device("cpu"))
        return trainer if lever.classes is None else _with_classes(trainer, lever, command)

    def _caption(self) -> str:
        return (
            f"Energies learned in front of one frozen natural network for {self.seconds:g} seconds "
            "of one core's time each, from which the updates (100 images each) follow. Baseline: "
            "train-defense --learn energy with K = 3, width 16, noise 0.05 a step, attacks of one "
            "step, one draw, cross-entropy, λ = 0, seed "
            f"{self.seed}. Clean and robust: fashion-mnist's validation split, {self.images} "
            f"images, Linf {self.eps:g}, PGD-{self.steps} on cross-entropy and on margin through "
            f"the chain, {self.replicates} fresh replicates a step, last iterates judged once by "
            f"the mean logits of {self.draws} draws, an image counts if it stands under both. p: "
            "McNemar's exact test against the baseline on the same images. 95% Wilson intervals."
        )


def _with_classes(trainer: DefenseTrainer, lever: Lever, command: TrainDefense) -> DefenseTrainer:
    """Return the trainer with a robust classifier in the energy's place."""
    assert lever.classes is not None
    chain = LearnedChain(
        LogSumExpEnergy(load_defense(lever.classes).classifier, unit=True),
        LangevinSettings(
            steps=command.langevin_steps,
            step_size=command.step_size,
            temperature=command.temperature,
        ),
        learn_drift=True,
        precision=command.precision,
    )
    return DefenseTrainer(
        chain, trainer.classifiers, trainer.batches, trainer.validation, trainer.recipe,
        trainer.adversary, precision=command.precision,
    )  # fmt: skip


def _cost(trainer: DefenseTrainer) -> float:
    """Return the processor time of an update."""
    for _ in range(2):
        trainer.step()
    begun = time.process_time()
    for _ in range(TIMED):
        trainer.step()
    return (time.process_time() - begun) / TIMED


def _judged(levers: Levers, trainer: DefenseTrainer, data: Images) -> dict[str, Tensor]:
    """Return which images are right, clean and under every attack, of the last averaged weights."""
    chain, classifier = trainer.kept(trainer.averaged.module.state_dict())
    assert isinstance(chain, LearnedChain)
    fast = _predictor(chain, classifier, levers.replicates, "fastest")
    exact = _predictor(chain, classifier, levers.draws, "fp32")
    robust = clean = _right(exact, data, levers.seed)
    for name, loss in LOSSES.items():
        attacked = [
            InputPerturbation()(
                partial(fast, generator_of(levers.seed, f"attack {name} {i}")), x, y,
                eps=levers.eps, steps=levers.steps, loss=loss,
                generator=generator_of(levers.seed, f"start {name} {i}"),
            )
            for i, (x, y) in enumerate(_batches(data))
        ]  # fmt: skip
        robust = robust & _right(exact, Images(torch.cat(attacked), data.labels), levers.seed)
    return {"clean": clean, "robust": robust}


Predictor = Callable[[torch.Generator, Tensor], Tensor]


def _predictor(chain: LearnedChain, classifier: nn.Module, draws: int, precision: str) -> Predictor:
    """Return the mean logits of so many draws, as a function of generator and images."""
    defended = copy.copy(chain)
    defended.precision = precision
    bf16 = resolve_precision(precision, torch.device("cpu"), torch.float32) == "bf16"

    def predict(generator: torch.Generator, images: Tensor) -> Tensor:
        noise, logits = GeneratorNoise(generator), []
        for _ in range(draws):
            purified = defended.purify(images, noise)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits.append(classifier(purified.contiguous(memory_format=torch.channels_last)))
        return torch.stack(logits).float().mean(0)

    return predict


def _right(predict: Predictor, data: Images, seed: int) -> Tensor:
    generator = generator_of(seed, "judge")
    found = [predict(generator, x).detach().argmax(-1) == y for x, y in _batches(data)]
    return torch.cat(found)


def _batches(data: Images) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True)


def _paired(base: Tensor | None, robust: Tensor) -> str:
    if base is None:
        return "–"
    return f"{mcnemar(int((base & ~robust).sum()), int((robust & ~base).sum())):.2g}"


if __name__ == "__main__":
    sys.exit(main(Levers))
