"""`ebm-defense train-ebm`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ebm_defense.commands.options.photos import Photos
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import (
    Device,
    resolve_device,
    write_settings,
)
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnostics import draw_curves, long_chains, save_grid
from ebm_defense.learning.energy import EnergyRecipe, EnergyTrainer
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.folders import ENERGY
from ebm_defense.storage.state_dicts import about, load_weights

PICTURED = 16

FIXED = {"data", "photos", "images", "width", "activation", "init", "bank", "seed"}
"""Options that a checkpoint holds the outcome of."""


@dataclass(frozen=True, kw_only=True)
class TrainEbm:
    """Learn an energy by maximum likelihood from persistent chains.

    Writes energy.safetensors (the running average of the weights), checkpoint.pt, history.csv,
    settings.toml and pictures into OUT. Repeat the command with --resume to go on exactly.
    """

    out: Path
    """Folder for everything."""
    data: str = "fashion-mnist"
    """Data set whose training split is learned."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    images: int | None = None
    """Learn from a stratified sample of this many images; all if not given."""
    width: int = 32
    """Channels of the first layer."""
    activation: str = "leaky_relu"
    """leaky_relu or soft_lrelu."""
    init: Path | None = None
    """Weights of the same width to begin from, as .safetensors."""
    updates: int = 10_000
    """Weight updates in all."""
    batch: int = 100
    """Data images, and chains, an update."""
    bank: int = 10_000
    """Persistent chains."""
    langevin_steps: int = 20
    """Langevin steps K between two updates."""
    step_size: float = 0.06
    """Langevin step size, in [-1, 1] units."""
    temperature: float = 0.0036
    """Temperature T."""
    data_noise: float = 0.12
    """Standard deviation of the noise on training images, in [-1, 1] units."""
    rejuvenation: float = 0.05
    """Probability that a visited chain starts afresh; a chain lives K/p steps on average."""
    start: str = "data"
    """Where fresh chains begin: data or uniform."""
    adam_lr: float = 2e-4
    """Adam's learning rate at the start."""
    final_lr: float = 1e-5
    """Adam's learning rate at the end of its cosine."""
    sgd_from: int | None = None
    """The update from which plain SGD takes over; Adam throughout if not given."""
    sgd_lr: float = 5e-5
    """SGD's learning rate, in units of the temperature."""
    average: float = 0.999
    """Decay of the weights' running average."""
    checkpoint_every: int = 250
    """Updates between two checkpoints."""
    pictures_every: int = 2_500
    """Updates between two sets of pictures of long chains."""
    chain_lengths: tuple[int, ...] = (100, 300, 1_000, 3_000, 10_000)
    """Steps at which chains from data are pictured."""
    precision: str = "fastest"
    """Precision of the learning chains' inner activations: fp32, bf16, or fastest (bf16 where it is
    native). The pictures' long chains are fp32."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""

    def recipe(self) -> EnergyRecipe:
        """Return the learning settings among these options."""
        return EnergyRecipe(
            updates=self.updates,
            batch=self.batch,
            bank=self.bank,
            langevin=LangevinSettings(
                steps=self.langevin_steps, step_size=self.step_size, temperature=self.temperature
            ),
            data_noise=self.data_noise,
            rejuvenation=self.rejuvenation,
            start=self.start,
            adam_lr=self.adam_lr,
            final_lr=self.final_lr,
            sgd_from=self.sgd_from,
            sgd_lr=self.sgd_lr,
            average=self.average,
            seed=self.seed,
        )

    def run(self) -> int:
        """Learn, keep checkpoints, draw pictures."""
        if min(self.checkpoint_every, self.pictures_every) < 1 or not self.chain_lengths:
            raise UsageError(
                "checkpoint_every and pictures_every must be ≥ 1, chain_lengths given."
            )
        recipe, device = self.recipe(), resolve_device(self.device)
        out = writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        opened = self.photos.open(self.data, "train", self.data_root, labelled=False)
        images = opened.take(self.images).images
        energy = self._energy(images).to(device)
        trainer = EnergyTrainer(energy, images, recipe, self.precision)
        if checkpoint is not None:
            trainer.load(checkpoint)
        write_settings(out, self)
        self._learn(trainer, out)
        print(f"energy and pictures are in {out}")
        return 0

    def _energy(self, images: torch.Tensor) -> ConvEnergy:
        if images.shape[-1] != images.shape[-2]:
            raise UsageError(f"a ConvEnergy needs square images, not {tuple(images.shape[-2:])}.")
        settings = ConvEnergySettings(
            channels=images.shape[1],
            image_size=images.shape[-1],
            width=self.width,
            activation=self.activation,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            energy = ConvEnergy(settings)
        if self.init is not None:
            load_weights(energy, self.init)
        channels_last(energy)
        return energy

    def _learn(self, trainer: EnergyTrainer, out: Path) -> None:
        bar = tqdm(trainer.run(), total=self.updates, initial=trainer.done, unit="update")
        for update in bar:
            bar.set_postfix_str(
                f"d_s {update.energy_difference:+.2f}, r_s {update.gradient_strength:.3f}"
            )
            last = update.number == self.updates
            if last or update.number % self.checkpoint_every == 0:
                keep(trainer, out, self.data)
            if last or update.number % self.pictures_every == 0:
                self._draw(trainer, out)

    def _draw(self, trainer: EnergyTrainer, out: Path) -> None:
        folder = writable_folder(out / "pictures")
        draw_curves(trainer.history, folder / "curves.png")
        name = f"{trainer.done:07d}"
        save_grid(trainer.bank[: 4 * PICTURED].split(PICTURED), folder / f"bank-{name}.png")
        chains = long_chains(
            trainer.averaged.module,
            trainer.images[:PICTURED].to(trainer.device),
            trainer.recipe.langevin,
            self.chain_lengths,
            self.seed,
        )
        save_grid([chains[k] for k in sorted(chains)], folder / f"chains-{name}.png")


def keep(trainer: EnergyTrainer, out: Path, data: str) -> None:
    """Write the checkpoint, the averaged weights and the history so far, each atomically."""
    trainer.save(out / CHECKPOINT)
    energy = trainer.averaged.module
    save_tensors(out / ENERGY, energy.state_dict(), about(energy, data=data))
    history = pd.DataFrame(trainer.history, columns=["update", "d_s", "r_s"])
    write_text(out / "history.csv", history.to_csv(index=False))
