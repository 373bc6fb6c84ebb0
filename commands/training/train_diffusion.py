"""`ebm-defense train-diffusion`."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from ebm_defense.commands.options.photos import Photos
from ebm_defense.commands.options.resume import CHECKPOINT, checkpoint_of
from ebm_defense.commands.options.shared import Device, resolve_device, write_settings
from ebm_defense.data import Images, dataset
from ebm_defense.denoisers.diffusers_layout import write_diffusers
from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.learning.diagnosis.diagnostics import save_grid
from ebm_defense.learning.diffusion import DiffusionRecipe, DiffusionTrainer
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.diffusion import DiffusionPurifier
from ebm_defense.storage.files import writable_folder, write_text

PICTURED = 12
DEPTHS = (100, 200, 300, 400, 500)
"""Noise levels, of 1,000, from which training images are pictured."""
GROUP = 8
TIMED = 3

FIXED = {
    "data", "photos", "images", "widths", "layers", "attention", "patch", "schedule", "levels",
    "seed",
}  # fmt: skip
"""Options that a checkpoint holds the outcome of."""


@dataclass(frozen=True, kw_only=True)
class TrainDiffusion:
    """Learn a diffusion model, a U-Net of diffusers, to purify with.

    Writes the running average of the weights in diffusers' layout (config.json,
    scheduler_config.json, diffusion_pytorch_model.safetensors), checkpoint.pt, history.csv,
    settings.toml and pictures into OUT. Repeat the command with --resume to go on exactly; then
    `evaluate --purifier diffusion:OUT`.
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
    widths: tuple[int, ...] = (32, 64)
    """Channels of the U-Net's resolutions, each half the one before; multiples of 8."""
    layers: int = 1
    """Residual blocks a resolution."""
    attention: int = 1
    """How many of the lowest resolutions have attention."""
    patch: int = 2
    """The network sees squares of so many pixels as one with as many more channels, which is
    cheaper; 1 for images as they are."""
    schedule: str = "linear"
    """Noise schedule: linear, scaled_linear or squaredcos_cap_v2."""
    levels: int = 1_000
    """Levels of noise."""
    updates: int = 10_000
    """Weight updates in all."""
    batch: int = 64
    """Images an update."""
    lr: float = 1e-3
    """AdamW's highest learning rate."""
    warmup: float = 0.05
    """The share of updates over which the rate rises, before a cosine."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    average: float = 0.999
    """Decay of the weights' running average."""
    padding: int = 0
    """Pixels of a random shift."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    pictures_every: int = 2_500
    """Updates between two sets of pictures."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of every draw."""
    resume: bool = False
    """Go on from the checkpoint in OUT, if there is one yet."""
    dry_run: bool = False
    """Time a few updates, print parameters and expected hours, and stop."""

    def recipe(self) -> DiffusionRecipe:
        """Return the learning settings among these options."""
        return DiffusionRecipe(
            updates=self.updates,
            batch=self.batch,
            lr=self.lr,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            average=self.average,
            padding=self.padding,
            flip=dataset(self.data).flip,
            seed=self.seed,
        )

    def run(self) -> int:
        """Learn, keep checkpoints, draw pictures."""
        if min(self.checkpoint_every, self.pictures_every) < 1:
            raise UsageError("checkpoint_every and pictures_every must be at least 1.")
        recipe, device = self.recipe(), resolve_device(self.device)
        opened = self.photos.open(self.data, "train", self.data_root, labelled=False)
        data = opened.take(self.images)
        denoiser = self._denoiser(data).to(device)
        trainer = DiffusionTrainer(denoiser, data, recipe)
        if self.dry_run:
            print(forecast(trainer))
            return 0
        out = writable_folder(self.out)
        checkpoint = checkpoint_of(out, self, FIXED)
        if checkpoint is not None:
            trainer.load(checkpoint)
        write_settings(out, self)
        self._learn(trainer, out)
        print(f"the denoiser is {out}; evaluate it with --purifier diffusion:{out}")
        return 0

    def _denoiser(self, data: Images) -> UNetDenoiser:
        channels, height, width = data.images.shape[1:]
        halvings = self.patch * 2 ** (len(self.widths) - 1)
        if height != width or not self.widths or height % halvings:
            raise UsageError(
                f"a U-Net of {len(self.widths)} resolutions on patches of {self.patch} needs "
                f"square images of a multiple of {halvings} pixels, not {height}x{width}."
            )
        if any(w < 1 or w % GROUP for w in self.widths) or self.layers < 1:
            raise UsageError(f"widths must be multiples of {GROUP}, and layers 1 or more.")
        kinds = ["Attn" if k >= len(self.widths) - self.attention else ""
                 for k in range(len(self.widths))]  # fmt: skip
        settings = UNetSettings(
            channels=channels,
            image_size=height,
            patch=self.patch,
            out_channels=channels * self.patch**2,
            block_out_channels=self.widths,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in kinds[::-1]),
            layers_per_block=self.layers,
            norm_num_groups=GROUP,
            schedule=self.schedule,
            levels=self.levels,
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return UNetDenoiser(settings)

    def _learn(self, trainer: DiffusionTrainer, out: Path) -> None:
        bar = tqdm(trainer.run(), total=self.updates, initial=trainer.done, unit="update")
        for update in bar:
            bar.set_postfix_str(f"loss {update.loss:.4f}", refresh=False)
            last = update.number == self.updates
            if last or update.number % self.checkpoint_every == 0:
                keep(trainer, out)
            if last or update.number % self.pictures_every == 0:
                self._draw(trainer, out)

    def _draw(self, trainer: DiffusionTrainer, out: Path) -> None:
        """Draw samples, and training images purified from deeper and deeper in the noise."""
        folder, name = writable_folder(out / "pictures"), f"{trainer.done:07d}"
        denoiser = averaged(trainer)
        images = trainer.batches.data.images[:PICTURED].to(trainer.device)
        keys = chain_keys(self.seed, "pictures", range(PICTURED), range(1))[0]
        noise = KeyedNoise(keys.to(trainer.device))
        depths = [max(1, d * self.levels // 1_000) for d in DEPTHS]
        rows = [DiffusionPurifier(denoiser, d, min(d, 25)).purify(images, noise) for d in depths]
        save_grid([2 * row - 1 for row in (images, *rows)], folder / f"purified-{name}.png")
        free = DiffusionPurifier(denoiser, self.levels, min(self.levels, 50))
        samples = [
            free.purify(torch.full_like(images, 0.5), KeyedNoise(noise.keys + k)) for k in range(2)
        ]
        save_grid([2 * row - 1 for row in samples], folder / f"samples-{name}.png")


def averaged(trainer: DiffusionTrainer) -> UNetDenoiser:
    """Return a copy of the running average, in evaluation mode."""
    found = deepcopy(trainer.averaged.module)
    assert isinstance(found, UNetDenoiser)
    return found.eval().requires_grad_(False)


def keep(trainer: DiffusionTrainer, out: Path) -> None:
    """Write the checkpoint, the averaged weights and the history so far, each atomically."""
    trainer.save(out / CHECKPOINT)
    write_diffusers(averaged(trainer), out)
    history = pd.DataFrame(trainer.history, columns=["update", "loss"])
    write_text(out / "history.csv", history.to_csv(index=False))


def forecast(trainer: DiffusionTrainer) -> str:
    """Say how many parameters learn and how long it takes, by timing a few updates."""
    updates, parameters = trainer.run(), sum(p.numel() for p in trainer.denoiser.parameters())
    next(updates)  # the first one sets things up
    start = time.perf_counter()
    took = [next(updates) for _ in range(TIMED)]
    hours = (time.perf_counter() - start) / len(took) * trainer.recipe.updates / 3600
    return (
        f"{parameters:,} parameters; {trainer.recipe.updates:,} updates of {trainer.recipe.batch} "
        f"images take {hours:.2g} hours at the speed of {len(took)} here"
    )
