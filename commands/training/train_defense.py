"""`ebm-defense train-defense`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import tyro
from torch import nn
from tqdm import tqdm

from ebm_defense.attacks.training import InputPerturbation
from ebm_defense.classifiers import WideResNetSettings, normalized
from ebm_defense.commands.options.photos import Photos
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import Device, resolve_device, write_settings
from ebm_defense.data import Images, Source, dataset
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.batches import Batches
from ebm_defense.learning.defenses.chain import LearnedChain
from ebm_defense.learning.defenses.objectives import Objective
from ebm_defense.learning.defenses.recipe import DefenseRecipe
from ebm_defense.learning.defenses.synthesis import synthesise
from ebm_defense.learning.defenses.trainer import DefenseTrainer, Progress
from ebm_defense.learning.energies.likelihood import Likelihood
from ebm_defense.learning.parallel import Team
from ebm_defense.networks import ConvNetSettings, NetworkSettings, ResNetSettings, make_network
from ebm_defense.purifiers import Purifier
from ebm_defense.purifiers.registry import baseline
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.folders import save_defense
from ebm_defense.storage.weights import load_defense, load_energy, load_purifier

UNDEFENDED = ":undefended"
FIXED = {
    "learn", "purifier", "classifier", "init", "data", "photos", "images", "width", "activation",
    "langevin_steps", "augment", "augment_images", "teacher", "agreement", "seed",
}  # fmt: skip
"""Options that a checkpoint holds the outcome of."""
ENERGY = "energy"
TIMED_UPDATES = 5

NETWORKS: dict[str, Callable[[int, int, int], NetworkSettings]] = {
    "conv": lambda channels, classes, size: ConvNetSettings(
        channels=channels, classes=classes, image_size=size
    ),
    "resnet": lambda channels, classes, size: ResNetSettings(channels=channels, classes=classes),
    "wide-10-2": lambda channels, classes, size: WideResNetSettings(
        channels=channels, classes=classes, depth=10, widen=2
    ),
    "wide-28-10": lambda channels, classes, size: WideResNetSettings(
        channels=channels, classes=classes
    ),
}
"""Networks that training may begin with, untrained, by (channels, classes, image size)."""


@dataclass(frozen=True, kw_only=True)
class TrainDefense:
    """Learn a whole defense against attacks on its input, through every step of its chain.

    Writes a defense folder, OUT/defense, of the averaged weights that were most robust on the
    validation images, and checkpoint.pt, history.csv and settings.toml. --config settings.toml
    does it again; --resume goes on exactly. torchrun's processes share each batch.
    """

    out: Path
    """Folder for everything."""
    learn: str = "energy"
    """What learns: energy (classifiers stay as they are), classifier, or both."""
    purifier: str = ENERGY
    """What stands in front: energy, none, or gaussian:STD."""
    classifier: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A network to begin with untrained (conv, resnet, wide-10-2, wide-28-10), or a defense's: a
    shipped name or a folder, with :undefended for the one it keeps beside its own. Several may
    stand behind an energy that learns; each update takes one, and the first is kept."""
    init: str | None = None
    """A defense whose energy, step size and noise to begin from."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    validation_images: int = 500
    """Images of the validation split that choose the best weights."""
    width: int = 16
    """Channels of the energy's first layer."""
    activation: str = "silu"
    """The energy's activation: silu, softplus, soft_lrelu, soft_lrelu:WIDTH, leaky_relu."""
    langevin_steps: int = 3
    """Langevin steps K."""
    step_size: float = 0.05
    """The chain's noise a step, in [-1, 1] units."""
    temperature: float = 0.00125
    """Temperature T at the start; the drift's factor is step_size²/(2T)."""
    learn_drift: bool = True
    """Learn the drift's factor, which is the temperature at a given noise."""
    learn_noise: bool = False
    """Learn the noise."""
    eps: float | None = None
    """Largest perturbation in [0, 1] units; the data set's custom if not given, 0 for ordinary
    training."""
    norm: str = "Linf"
    """Its norm: Linf, L2 or L1."""
    attack_steps: tuple[int, ...] = (1, 1, 2, 2, 2)
    """Gradient steps of the attacks, one number for each of so many equal stages."""
    draws: int = 1
    """Replicates a prediction averages, in the attack and in the loss."""
    loss: str = "cross-entropy"
    """cross-entropy, margin or trades."""
    beta: float = 6.0
    """TRADES's weight of the divergence."""
    clean: float = 0.0
    """Share of the clean images' loss, for cross-entropy and margin."""
    reconstruction: float = 0.0
    """α, the weight of the purified images' mean squared distance from the originals."""
    reconstruction_shape: float = 2.0
    """Shape of Barron's robust loss in place of that square: 2 is the square, 1 a smooth absolute
    value, 0 Cauchy's."""
    reconstruction_scale: float = 0.1
    """Its scale, in [0, 1] units: differences far below it count by their square."""
    likelihood: float = 0.0
    """λ, the weight of maximum likelihood beside the loss; 0 for none."""
    augment: str | None = None
    """A defense whose chains make more training images."""
    augment_images: int = 20_000
    """How many such chains."""
    augment_share: float = 0.3
    """Share of a batch that their images have."""
    teacher: str | None = None
    """The robust defense that labels them; --augment's own if not given."""
    agreement: float = 0.8
    """Probability that the teacher must give its class."""
    updates: int = 10_000
    """Weight updates in all."""
    batch: int = 100
    """Images an update."""
    lr: float = 3e-3
    """Highest learning rate of the energy."""
    classifier_lr: float = 2e-3
    """Highest learning rate of the classifier."""
    weight_decay: float = 0.02
    """AdamW's weight decay, of the classifier."""
    average: float = 0.998
    """Decay of the weights' running average."""
    clip: float = 1.0
    """Largest norm of a gradient."""
    warmup: float = 0.03
    """Share of the updates over which the rates rise."""
    eps_rise: float = 0.05
    """Share of the updates over which eps rises from a third."""
    padding: int = 0
    """Pixels of a random shift."""
    flip: bool = False
    """Mirror every other image."""
    validate_every: int | None = None
    """Updates between two validations and checkpoints; an epoch if not given."""
    validation_steps: int = 10
    """Gradient steps of the validation's attack."""
    validation_draws: int = 4
    """Replicates that judge it."""
    replicates: int = 16
    """Purifications an image of the defense that is written."""
    description: str = ""
    """One sentence for lists."""
    compiled: bool = False
    """Let torch compile the energy's activations, which needs a C++ compiler on a CPU."""
    precision: str = "fastest"
    """Precision of inner activations: fp32, bf16, or fastest (bf16 where native)."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""
    dry_run: bool = False
    """Time a few updates, print the hours of all, and stop."""

    def recipe(self) -> DefenseRecipe:
        """Return the learning settings among these options."""
        objective = Objective(loss=self.loss, beta=self.beta, clean=self.clean)
        return DefenseRecipe(
            learn=self.learn,
            updates=self.updates,
            eps=dataset(self.data).eps if self.eps is None else self.eps,
            attack_steps=self.attack_steps,
            draws=self.draws,
            objective=objective,
            reconstruction=self.reconstruction,
            reconstruction_shape=self.reconstruction_shape,
            reconstruction_scale=self.reconstruction_scale,
            likelihood=Likelihood(weight=self.likelihood) if self.likelihood else None,
            lr=self.lr,
            classifier_lr=self.classifier_lr,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            eps_rise=self.eps_rise,
            clip=self.clip,
            average=self.average,
            validate_every=self.validate_every,
            validation_steps=self.validation_steps,
            validation_draws=self.validation_draws,
            seed=self.seed,
        )

    def run(self) -> int:
        """Learn, validate, keep the best."""
        recipe, device = self.recipe(), resolve_device(self.device)
        out = writable_folder(self.out)
        checkpoint = None if self.dry_run else checkpoint_of(out, self, FIXED)
        trainer = self._trainer(recipe, device)
        if self.dry_run:
            print(hours(trainer))
            return 0
        if checkpoint is not None:
            trainer.load(checkpoint)
        if trainer.team.leads:
            write_settings(out, self)
        self._learn(trainer, out)
        trainer.team.leave()
        return 0

    def _trainer(self, recipe: DefenseRecipe, device: torch.device) -> DefenseTrainer:
        train = self._open("train").take(self.images)
        purifier = self._purifier(train).to(device)
        return DefenseTrainer(
            purifier,
            [c.to(device) for c in self._classifiers(train)],
            self._batches(train),
            self._validation(),
            recipe,
            InputPerturbation(norm=self.norm),
            precision=self.precision,
            team=Team.of(device),
        )

    def _validation(self) -> Images:
        everything = self._open("val")
        few = len(everything.labels) <= self.validation_images
        return everything.take(None if few else self.validation_images)

    def _open(self, split: str) -> Source:
        return self.photos.open(self.data, split, self.data_root)

    def _batches(self, train: Images) -> Batches:
        return Batches(
            data=train,
            size=self.batch,
            padding=self.padding,
            flip=self.flip,
            extra=self._more(train),
            share=self.augment_share if self.augment else 0.0,
            seed=self.seed,
        )

    def _more(self, train: Images) -> Images | None:
        if self.augment is None:
            return None
        return synthesise(
            train,
            load_purifier(self.augment),
            load_defense(self.teacher or self.augment, seed=self.seed),
            count=self.augment_images,
            agreement=self.agreement,
            seed=self.seed,
        )

    def _purifier(self, train: Images) -> Purifier:
        if self.purifier != ENERGY:
            return baseline(self.purifier)
        chain = LangevinSettings(
            steps=self.langevin_steps, step_size=self.step_size, temperature=self.temperature
        )
        energy, chain = self._begun(chain) if self.init else (self._energy(train), chain)
        return LearnedChain(
            channels_last(energy),
            chain,
            learn_drift=self.learn_drift,
            learn_noise=self.learn_noise,
            precision=self.precision,
            compiled=self.compiled,
        )

    def _begun(self, chain: LangevinSettings) -> tuple[nn.Module, LangevinSettings]:
        assert self.init is not None
        kept = getattr(load_purifier(self.init), "settings", None)
        return load_energy(self.init), kept if isinstance(kept, LangevinSettings) else chain

    def _energy(self, train: Images) -> nn.Module:
        channels, height, width = train.images.shape[1:]
        if height != width:
            raise UsageError(f"a ConvEnergy needs square images, not {height}×{width}.")
        settings = ConvEnergySettings(
            channels=channels, image_size=height, width=self.width, activation=self.activation
        )
        return self._untrained(partial(ConvEnergy, settings))

    def _classifiers(self, train: Images) -> list[nn.Module]:
        if not self.classifier:
            raise UsageError(
                f"name a classifier: {', '.join(NETWORKS)} to learn one, or a defense's."
            )
        return [self._classifier(spec, train) for spec in self.classifier]

    def _classifier(self, spec: str, train: Images) -> nn.Module:
        if spec not in NETWORKS:
            defense = load_defense(spec.removesuffix(UNDEFENDED))
            return defense.undefended if spec.endswith(UNDEFENDED) else defense.classifier
        classes = len(dataset(self.data).classes) or int(train.labels.max()) + 1
        settings = NETWORKS[spec](train.images.shape[1], classes, train.images.shape[-1])
        network = self._untrained(partial(make_network, settings))
        return normalized(channels_last(network), 0.5, 0.5)

    def _untrained(self, make: Callable[[], nn.Module]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return make()

    def _learn(self, trainer: DefenseTrainer, out: Path) -> None:
        with tqdm(total=self.updates, initial=trainer.done, unit="update") as bar:
            for found in trainer.run():
                bar.update(found.update - bar.n)
                if trainer.team.leads:
                    bar.write(line(found))
                    self._keep(trainer, out)
                trainer.save(out / CHECKPOINT)
        if trainer.team.leads:
            print(f"the defense is {out / 'defense'}; evaluate it with --defense {out / 'defense'}")

    def _keep(self, trainer: DefenseTrainer, out: Path) -> None:
        """Write the best weights and the history, each atomically."""
        purifier, classifier = trainer.kept()
        defense = PurifiedClassifier(
            classifier.cpu(),
            purifier.fixed() if isinstance(purifier, LearnedChain) else purifier,
            replicates=self.replicates if purifier.stochastic else 1,
        )
        save_defense(defense, out / "defense", description=self._described(), data=self.data)
        history = pd.DataFrame(trainer.history, columns=list(Progress._fields))
        write_text(out / "history.csv", history.to_csv(index=False))

    def _described(self) -> str:
        if self.description:
            return self.description
        with_energy = self.purifier == ENERGY
        likelihood = f", likelihood weight λ = {self.likelihood:g}" if with_energy else ""
        return f"{self.data}: {self.learn} learned against attacks on the input{likelihood}."


def line(found: Progress) -> str:
    """Return a validation in one line."""
    return (
        f"update {found.update}: loss {found.loss:.4f}, training {found.attacked:.1%} under "
        f"attack, validation {found.clean:.1%} clean and {found.robust:.1%} under attack"
        + (f", {found.skipped} updates skipped" if found.skipped else "")
    )


def hours(trainer: DefenseTrainer) -> str:
    """Time a few updates of each stage and return what all would take on this machine."""
    r, seconds = trainer.recipe, 0.0
    stages = len(r.attack_steps)
    for stage in range(stages):
        trainer.done = stage * r.updates // stages
        trainer.step()
        begun = time.perf_counter()
        for _ in range(TIMED_UPDATES):
            trainer.step()
        seconds += (time.perf_counter() - begun) / TIMED_UPDATES * r.updates / stages
    return f"{r.updates} updates of {trainer.batches.size} images: {seconds / 3600:.2f} hours."
