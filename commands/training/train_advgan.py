"""`ebm-defense train-advgan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
from tqdm import tqdm

from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.external.advgan_training import AdvGANRecipe, AdvGANTrainer, Update
from ebm_defense.attacks.gradients.registry import make_gradient
from ebm_defense.attacks.norms import norm_name
from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import (
    Device,
    Fraction,
    put_on,
    resolve_device,
    write_settings,
)
from ebm_defense.data import customary_eps
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.weights import load_defense

FIXED = {"data", "photos", "split", "images", "defense", "against", "width", "seed"}
"""Options that a checkpoint holds the outcome of."""


@dataclass(frozen=True, kw_only=True)
class TrainAdvgan:
    """Train AdvGAN's generator against a defense; `evaluate --attack advgan:OUT` judges it.

    Writes generator.safetensors, advgan.toml, checkpoint.pt, history.csv and settings.toml into
    OUT.
    """

    out: Path
    """Folder for everything."""
    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    against: Literal["defense", "classifier"] = "defense"
    """What the generator learns to fool: the whole defense, or its classifier alone."""
    gradient: str = "bpda"
    """How the defense is differentiated."""
    langevin_steps: int | None = None
    """Langevin steps K while training, instead of the defense's own."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "train"
    """train, val or test."""
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    norm: str = "Linf"
    """Linf or L2."""
    eps: Fraction | None = None
    """Largest perturbation, in [0, 1] pixel units; the data set's custom if not given."""
    updates: int = 2_000
    """Steps of generator and discriminator."""
    batch: int = 64
    """Images a step."""
    lr: float = 1e-3
    """Adam's learning rate."""
    gan_weight: float = 0.1
    """How much the images shall look unattacked."""
    hinge_weight: float = 1.0
    """How strongly perturbations above the bound are held down."""
    bound: float | None = None
    """That bound on the L2 norm, in [0, 1] units; the largest the threat allows if not given."""
    confidence: float = 5.0
    """The margin of logits at which an image counts as broken well enough."""
    replicates: int = 2
    """Purifications an image and step."""
    width: int = 16
    """Channels of the generator's first layer, a multiple of 4."""
    checkpoint_every: int = 50
    """Updates between two checkpoints."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""

    def recipe(self) -> AdvGANRecipe:
        """Return the training settings among these options."""
        return AdvGANRecipe(
            updates=self.updates,
            batch=self.batch,
            lr=self.lr,
            gan_weight=self.gan_weight,
            hinge_weight=self.hinge_weight,
            bound=self.bound,
            confidence=self.confidence,
            replicates=self.replicates,
            width=self.width,
            seed=self.seed,
        )

    def run(self) -> int:
        """Train, keep checkpoints, write the generator."""
        if self.checkpoint_every < 1:
            raise UsageError("checkpoint_every must be at least 1.")
        recipe, threat = self.recipe(), self._threat()
        gradient = make_gradient(self.gradient)
        device, out = resolve_device(self.device), writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        defense = put_on(self._defense(), device)
        source = self.photos.open(self.data, self.split, self.data_root, wanted_by(defense))
        images, labels = (part.to(device) for part in source.take(self.images))
        trainer = AdvGANTrainer(defense, images, labels, threat, recipe, gradient)
        if checkpoint is not None:
            trainer.load(checkpoint)
        write_settings(out, self)
        self._learn(trainer, out)
        print(f"the generator is in {out}; judge it with evaluate --attack advgan:{out}")
        return 0

    def _threat(self) -> ThreatModel:
        eps = customary_eps(self.data, norm_name(self.norm)) if self.eps is None else self.eps
        return ThreatModel(norm=self.norm, eps=eps)

    def _defense(self) -> PurifiedClassifier:
        defense = load_defense(self.defense, steps=self.langevin_steps, seed=self.seed)
        return defense if self.against == "defense" else as_defense(defense.classifier)

    def _learn(self, trainer: AdvGANTrainer, out: Path) -> None:
        bar = tqdm(trainer.run(), total=self.updates, initial=trainer.done, unit="update")
        for update in bar:
            bar.set_postfix_str(f"margin {update.margin:+.2f}, fooled {update.fooled:.0%}")
            if update.number == self.updates or update.number % self.checkpoint_every == 0:
                keep(trainer, out)


def keep(trainer: AdvGANTrainer, out: Path) -> None:
    """Write the checkpoint, the generator and the history so far, each atomically."""
    trainer.save(out / CHECKPOINT)
    trainer.generator.save(out)
    history = pd.DataFrame(trainer.history, columns=list(Update._fields))
    write_text(out / "history.csv", history.to_csv(index=False))
