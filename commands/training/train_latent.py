"""`ebm-defense train-latent`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from ebm_defense.commands.options.photos import Photos
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import Device, resolve_device, write_settings
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.generators.networks import (
    ConvEncoder,
    ConvGenerator,
    ConvSettings,
    DenseEncoder,
    DenseGenerator,
    DenseSettings,
    Encoder,
    Generator,
    ImageSettings,
    LatentClassifier,
    LatentClassifierSettings,
    LatentEnergy,
    LatentEnergySettings,
    PairEnergy,
    PairEnergySettings,
)
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.diagnostics import save_grid
from ebm_defense.learning.latent.model import Model
from ebm_defense.learning.latent.recipes import RECIPES
from ebm_defense.learning.latent.settings import LatentSettings
from ebm_defense.learning.latent.trainer import LatentTrainer
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.storage.files import writable_folder, write_text
from ebm_defense.storage.folders import save_purifier
from ebm_defense.storage.weights import load_purifier

PURIFIER, PICTURED = "purifier", 16

FIXED = {
    "recipe", "data", "photos", "images", "init", "network", "latent", "upper", "width", "hidden",
    "energy_width", "stages", "attribute", "batch", "seed",
}  # fmt: skip
"""Options that a checkpoint holds the outcome of."""


@dataclass(frozen=True, kw_only=True)
class TrainLatent:
    """Learn a generator, its encoder and an energy by a recipe, to purify with.

    Writes the folder purifier (which --purifier takes), checkpoint.pt, history.csv, settings.toml
    and pictures into OUT. Repeat the command with --resume to go on exactly.
    """

    out: Path
    """Folder for everything."""
    recipe: str = "latent-prior"
    """vae, latent-prior, triangle, joint and dual-mcmc learn all networks; nce, hat, gebm and
    attributes an energy for the generator and encoder of --init."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    init: Path | None = None
    """A folder purifier of another training, whose networks to begin from, or which are given."""
    network: str = "conv"
    """conv or dense: generator and encoder, where --init gives none."""
    latent: int = 32
    """Numbers of z."""
    upper: int = 0
    """Numbers of a second layer above it; 0 for none."""
    width: int = 16
    """Channels of a conv generator and encoder at full resolution."""
    hidden: int = 256
    """Neurons of a dense generator's and encoder's hidden layer, and a quarter as many of an
    energy's of latents."""
    energy_width: int = 16
    """Channels of an image energy's first layer."""
    stages: int = 1
    """Networks that a latent energy adds up; recipe nce learns one after another."""
    updates: int = 3_000
    """Weight updates in all."""
    batch: int = 100
    """Data images, and chains, an update."""
    attribute: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Recipe attributes: the classes that have an attribute beside the class itself, as in 5,7,9;
    may be given several times."""
    sigma: float = 0.3
    """Standard deviation of images around G(z), in [-1, 1] units."""
    prior_steps: int = 60
    """Steps of the prior's short-run chains."""
    prior_step_size: float = 0.4
    """Their step size, in units of z."""
    posterior_steps: int = 20
    """Steps of chains of an image's latents, also of those that purify."""
    posterior_step_size: float = 0.1
    """Their step size, in units of z."""
    image_steps: int = 20
    """Steps of chains of images, or of residuals and latents."""
    image_step_size: float = 0.05
    """Their step size, in [-1, 1] pixel units."""
    latent_step_size: float = 0.05
    """Step size of the latents beside residuals; with 0 they are held."""
    temperature: float | None = None
    """Temperature of an image energy; if not given, 1 for triangle, joint and gebm, and 0.00125
    for hat and dual-mcmc."""
    flow_time: float = 1.0
    """Time of the flow along attributes; it takes the posterior's steps."""
    magnitude: float = 0.01
    """Weight of the mean squared image energy where nothing else bounds it."""
    lr: float = 1e-3
    """Adam's learning rate of generator and encoder at the start of a cosine."""
    energy_lr: float | None = None
    """That of the energy; if not given, 0.001 for one of latents, 0.003 for one of attributes, and
    0.0002 for one of images."""
    average: float = 0.99
    """Decay of the weights' running average."""
    checkpoint_every: int = 250
    """Updates between two checkpoints."""
    pictures_every: int = 1_000
    """Updates between two sets of pictures."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""

    def settings(self) -> LatentSettings:
        """Return the learning settings among these options."""
        usual = RECIPES[self.recipe]
        named = ("updates", "batch", "sigma", "latent_step_size", "magnitude", "flow_time", "lr",
                 "average", "seed")  # fmt: skip
        temperature = usual.temperature if self.temperature is None else self.temperature
        return LatentSettings(
            prior=_chain(self.prior_steps, self.prior_step_size),
            posterior=_chain(self.posterior_steps, self.posterior_step_size),
            image=_chain(self.image_steps, self.image_step_size, temperature),
            energy_lr=usual.energy_lr if self.energy_lr is None else self.energy_lr,
            **{name: getattr(self, name) for name in named},
        )

    def run(self) -> int:
        """Learn, keep checkpoints and what purifies, draw pictures."""
        self._refuse()
        settings, device = self.settings(), resolve_device(self.device)
        out = writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        labelled = RECIPES[self.recipe].energy == "attributes"
        opened = self.photos.open(self.data, "train", self.data_root, labelled=labelled)
        images, labels = opened.take(self.images)
        values = self._values(labels) if labelled else None
        model = self._model(images, values)
        for network in model.networks.values():
            network.to(device).requires_grad_()
        trainer = LatentTrainer(model, images, self.recipe, settings, values)
        if checkpoint is not None:
            trainer.load(checkpoint)
        write_settings(out, self)
        self._learn(trainer, out)
        print(
            f"the purifier is {out / PURIFIER}; put it before a classifier with --purifier, and "
            f"see {out / 'pictures'}"
        )
        return 0

    def _refuse(self) -> None:
        if self.recipe not in RECIPES:
            raise UsageError(f"recipe is {self.recipe!r}; choose one of {', '.join(RECIPES)}.")
        if RECIPES[self.recipe].given and self.init is None:
            raise UsageError(
                f"recipe {self.recipe} learns an energy for a generator and encoder that are "
                "given; give --init FOLDER, the folder purifier of a training by vae or "
                "latent-prior."
            )
        if self.network not in NETWORKS:
            raise UsageError(f"network is {self.network!r}; choose one of {', '.join(NETWORKS)}.")
        if min(self.checkpoint_every, self.pictures_every) < 1:
            raise UsageError("checkpoint_every and pictures_every must be at least 1.")

    def _values(self, labels: Tensor) -> Tensor:
        """Return each image's class, and whether it has each attribute."""
        sets = [_classes(text, int(labels.max())) for text in self.attribute]
        columns = [labels, *(torch.isin(labels, classes).long() for classes in sets)]
        return torch.stack(columns, dim=1)

    def _model(self, images: Tensor, values: Tensor | None) -> Model:
        if images.shape[-1] != images.shape[-2]:
            raise UsageError(f"a generator makes square images, not {tuple(images.shape[-2:])}.")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            made = NETWORKS[self.network](self, *images.shape[1:3])
        networks = dict(zip(("generator", "encoder"), made, strict=True)) | self._given()
        generator = cast(Generator, networks["generator"])
        shape = generator.settings
        if (shape.channels, shape.image_size) != tuple(images.shape[1:3]):
            raise UsageError(
                f"{self.init} makes images {shape.channels}x{shape.image_size}x{shape.image_size}, "
                f"not {'x'.join(map(str, images.shape[1:]))} as {self.data}."
            )
        energy = self._energy(generator, networks.get("energy"), values)
        return Model(generator, cast(Encoder, networks["encoder"]), energy)

    def _given(self) -> dict[str, nn.Module]:
        """Return the networks of --init."""
        if self.init is None:
            return {}
        found = load_purifier(self.init).networks
        missing = {"generator", "encoder"} - {*found}
        if missing:
            raise UsageError(
                f"{self.init} has no {' and no '.join(sorted(missing))}; give a folder purifier of "
                "train-latent."
            )
        return found

    def _energy(
        self, generator: Generator, given: nn.Module | None, values: Tensor | None
    ) -> nn.Module:
        """Return the energy of --init if it is of the recipe's shape, or a fresh one."""
        shape = generator.settings
        if values is None:
            make, settings = ENERGY_OF[RECIPES[self.recipe].energy](self, shape)
        else:
            counts = tuple(int(column.max()) + 1 for column in values.unbind(1))
            hidden = max(1, self.hidden // 4)
            settings = LatentClassifierSettings(size=shape.size, values=counts, hidden=hidden)
            make = LatentClassifier
        if getattr(given, "settings", None) == settings:
            assert given is not None
            return given
        with torch.random.fork_rng():
            torch.manual_seed(self.seed + 1)
            return make(settings)

    def _learn(self, trainer: LatentTrainer, out: Path) -> None:
        bar = tqdm(trainer.run(), total=self.updates, initial=trainer.done, unit="update")
        for update in bar:
            bar.set_postfix_str(", ".join(f"{k} {v:.3g}" for k, v in update.losses.items()))
            last = update.number == self.updates
            if last or update.number % self.pictures_every == 0:
                draw(trainer, writable_folder(out / "pictures"))
            if last or update.number % self.checkpoint_every == 0:
                keep(trainer, out, self.data, self.recipe)


def _classes(text: str, last: int) -> Tensor:
    """Read the classes of an attribute: "5,7,9"."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) <= last for part in parts):
        raise UsageError(
            f"--attribute {text!r} must name classes from 0 to {last}, parted by commas: 5,7,9."
        )
    return torch.tensor([int(part) for part in parts])


def _chain(steps: int, step_size: float, temperature: float = 1.0) -> LangevinSettings:
    return LangevinSettings(steps=steps, step_size=step_size, temperature=temperature)


def _conv(c: TrainLatent, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    shape = ConvSettings(
        latent=c.latent, upper=c.upper, channels=channels, image_size=size, width=c.width
    )
    return ConvGenerator(shape), ConvEncoder(shape)


def _dense(c: TrainLatent, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    shape = DenseSettings(
        latent=c.latent, upper=c.upper, channels=channels, image_size=size, hidden=c.hidden
    )
    return DenseGenerator(shape), DenseEncoder(shape)


NETWORKS: dict[str, Callable[[TrainLatent, int, int], tuple[nn.Module, nn.Module]]] = {
    "conv": _conv,
    "dense": _dense,
}
"""Generators and their encoders, by the names that options call them."""


def _of_latents(c: TrainLatent, shape: ImageSettings) -> tuple[Callable[[Any], nn.Module], Any]:
    hidden = max(1, c.hidden // 4)
    return LatentEnergy, LatentEnergySettings(size=shape.size, hidden=hidden, stages=c.stages)


def _of_images(c: TrainLatent, shape: ImageSettings) -> tuple[Callable[[Any], nn.Module], Any]:
    settings = ConvEnergySettings(
        channels=shape.channels,
        image_size=shape.image_size,
        width=c.energy_width,
        activation=shape.activation,
    )
    return ConvEnergy, settings


def _of_pairs(c: TrainLatent, shape: ImageSettings) -> tuple[Callable[[Any], nn.Module], Any]:
    settings = PairEnergySettings(
        latent=shape.latent,
        upper=shape.upper,
        channels=shape.channels,
        image_size=shape.image_size,
        width=c.energy_width,
        hidden=max(1, c.hidden // 4),
        activation=shape.activation,
    )
    return PairEnergy, settings


ENERGY_OF = {"latents": _of_latents, "images": _of_images, "pairs": _of_pairs}
"""Energies, by what a recipe's is of."""


def draw(trainer: LatentTrainer, folder: Path) -> None:
    """Draw what the model dreams, and training images above what they are purified to."""
    count, name = PICTURED, f"{trainer.done:06d}"
    save_grid(trainer.samples(4 * count).split(count), folder / f"samples-{name}.png")
    images = (trainer.images[:count].to(trainer.device) + 1.0) / 2.0
    keys = chain_keys(trainer.settings.seed, "pictures", range(len(images)), range(1))[0]
    with torch.no_grad():
        purified = trainer.purifier().purify(images, KeyedNoise(keys.to(trainer.device)))
    rows = [2.0 * images - 1.0, 2.0 * purified - 1.0]
    save_grid(rows, folder / f"purified-{name}.png")


def keep(trainer: LatentTrainer, out: Path, data: str, recipe: str) -> None:
    """Write what purifies, the history so far and, last, the checkpoint, each atomically."""
    said = f"Learned by recipe {recipe} on {data}, {trainer.done:,} updates."
    save_purifier(trainer.purifier(), out / PURIFIER, description=said, data=data)
    rows = [{"update": u.number} | u.losses for u in trainer.history]
    write_text(out / "history.csv", pd.DataFrame(rows).to_csv(index=False))
    trainer.save(out / CHECKPOINT)
