"""`ebm-defense train-classifier`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.training import TrainingPerturbation
from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.commands.options.photos import Photos, Wanted, wanted_by
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import (
    Device,
    Fraction,
    make_purifier,
    resolve_device,
    write_settings,
)
from ebm_defense.data import Images, dataset
from ebm_defense.energies.conv import channels_last
from ebm_defense.learning.classifier import ClassifierRecipe, ClassifierTrainer, Copies, accuracy
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier
from ebm_defense.storage.files import load_plain, save_state, save_tensors, writable_folder
from ebm_defense.storage.folders import CLASSIFIER
from ebm_defense.storage.state_dicts import about, load_weights

PURIFY_BATCH = 400
VALIDATION_IMAGES = 1_000
MEAN, STD = 0.5, 0.5
"""The normalisation that it learns behind."""

FIXED = {
    "data", "photos", "images", "depth", "widen", "init", "purified", "purify_steps", "seed",
}  # fmt: skip
"""Options that a checkpoint holds the outcome of."""


@dataclass(frozen=True, kw_only=True)
class TrainClassifier:
    """Learn a wide ResNet on images as they are, or as a purifier leaves them.

    Writes classifier.safetensors, checkpoint.pt and settings.toml into OUT. Purified images are
    kept there too, part by part, so --resume purifies nothing twice.
    """

    out: Path
    """Folder for everything."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned and whose validation split is measured."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    depth: int = 10
    """Depth 6n + 4 of the wide ResNet."""
    widen: int = 2
    """Its widening factor."""
    init: Path | None = None
    """Weights to begin from, as .safetensors."""
    purified: str | None = None
    """Learn on purified images: a shipped defense, a folder, a baseline (gaussian:0.25) or
    package.module:factory."""
    purify_steps: int | None = None
    """Langevin steps of that purifier, instead of its own number."""
    epochs: int = 30
    """Passes over the images."""
    batch: int = 100
    """Images a step."""
    lr: float = 0.1
    """The highest learning rate."""
    warmup: float = 0.2
    """The share of steps over which the rate rises."""
    momentum: float = 0.9
    """SGD's momentum."""
    weight_decay: float = 5e-4
    """SGD's weight decay."""
    padding: int = 2
    """Pixels of a random shift."""
    adversarial_eps: Fraction | None = None
    """Adversarial training: Linf perturbations this large, around the (purified) images."""
    adversarial_steps: int = 2
    """Gradient steps of those perturbations."""
    copies: int = 1
    """How many differently purified copies of the images the epochs cycle through."""
    precision: str = "fastest"
    """Precision of the network's inner activations: fp32, bf16, or fastest (bf16 where native)."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""

    def recipe(self) -> ClassifierRecipe:
        """Return the learning settings among these options."""
        return ClassifierRecipe(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            warmup=self.warmup,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            padding=self.padding,
            flip=dataset(self.data).flip,
            copies=self.copies,
            seed=self.seed,
        )

    def run(self) -> int:
        """Purify if asked, learn, measure on the validation split."""
        recipe, device = self.recipe(), resolve_device(self.device)
        out = writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        purifier = make_purifier(self.purified, self.purify_steps) if self.purified else None
        wanted = wanted_by(purifier) if purifier is not None else Wanted()
        source = self.photos.open(self.data, "train", self.data_root, wanted)
        train, held_out = source.take(self.images), self._validation(wanted)
        classifier = self._classifier(train, len(source.classes)).to(device)
        images = train.images if purifier is None else self._copies(train.images, purifier, out)
        trainer = ClassifierTrainer(
            classifier, images, train.labels, recipe, self.precision, self._perturb()
        )
        if checkpoint is not None:
            trainer.load(checkpoint)
        write_settings(out, self)
        if purifier is not None:
            held_out = Images(
                purify_all(purifier, held_out.images, self.seed, "validation"), held_out.labels
            )
        self._learn(trainer, held_out, out)
        return 0

    def _perturb(self) -> TrainingPerturbation | None:
        if self.adversarial_eps is None:
            return None
        threat = ThreatModel(norm="Linf", eps=self.adversarial_eps)
        return TrainingPerturbation(threat=threat, steps=self.adversarial_steps)

    def _validation(self, wanted: Wanted) -> Images:
        source = self.photos.open(self.data, "val", self.data_root, wanted)
        return source.take(min(len(source.labels), VALIDATION_IMAGES))

    def _classifier(self, train: Images, classes: int) -> nn.Module:
        settings = WideResNetSettings(
            channels=train.images.shape[1],
            classes=classes or int(train.labels.max()) + 1,
            depth=self.depth,
            widen=self.widen,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = WideResNet(settings)
        if self.init is not None:
            load_weights(network, self.init)
        return normalized(channels_last(network), MEAN, STD)

    def _copies(self, images: Tensor, purifier: Purifier, out: Path) -> Copies:
        """Return purified copies of the training images, kept on disk part by part."""
        if purifier.chain_steps == 0:
            return lambda copy: purify_all(purifier, images, self.seed, f"copy {copy}")
        folder = writable_folder(out / "purified")
        made = [_keep_copy(purifier, images, self.seed, c, folder) for c in range(self.copies)]
        return lambda copy: made[copy]

    def _learn(self, trainer: ClassifierTrainer, held_out: Images, out: Path) -> None:
        bar = tqdm(trainer.run(), total=self.epochs, initial=len(trainer.history), unit="epoch")
        for epoch in bar:
            trainer.save(out / CHECKPOINT)
            right = accuracy(trainer.classifier, held_out.images, held_out.labels)
            bar.write(
                f"epoch {epoch.number}: loss {epoch.loss:.4f}, "
                f"training {epoch.accuracy:.2%}, validation {right:.2%}"
            )
        network = trainer.classifier.get_submodule("classifier")
        said = about(network, data=self.data, mean=MEAN, std=STD)
        save_tensors(out / CLASSIFIER, network.state_dict(), said)
        print(f"the classifier is {out / CLASSIFIER}")


def purify_all(purifier: Purifier, images: Tensor, seed: int, purpose: str) -> Tensor:
    """Purify images in batches, each with noise of its own number."""
    keys = chain_keys(seed, purpose, range(len(images)), range(1))[0]
    parts = zip(images.split(PURIFY_BATCH), keys.split(PURIFY_BATCH), strict=True)
    with torch.no_grad():
        return torch.cat([purifier(x, noise=KeyedNoise(k)) for x, k in parts])


def _keep_copy(purifier: Purifier, images: Tensor, seed: int, copy: int, folder: Path) -> Tensor:
    keys = chain_keys(seed, f"copy {copy}", range(len(images)), range(1))[0]
    parts = []
    starts = range(0, len(images), PURIFY_BATCH)
    for start in tqdm(starts, desc=f"purifying, copy {copy + 1}", unit="batch"):
        file = folder / f"{copy}-{start:06d}.pt"
        rows = slice(start, start + PURIFY_BATCH)
        if not file.exists():
            purified = purifier(images[rows], noise=KeyedNoise(keys[rows]))
            save_state(file, {"images": purified})
        parts.append(load_plain(file)["images"])
    return torch.cat(parts)
