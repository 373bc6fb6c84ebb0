"""`ebm-defense sample`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
import torch
import tyro
from torch import Tensor

from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, resolve_device
from ebm_defense.commands.options.subject import Subject, subject_of
from ebm_defense.errors import UsageError
from ebm_defense.eval.frechet import features_of, frechet_distance, inception_fid
from ebm_defense.learning.diagnosis.diagnostics import save_grid
from ebm_defense.learning.shortrun import ShortRun
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.weights import load_defense

COLUMNS, SCALE = 16, 2
AT_ONCE = 400
FOUND = "sample.toml"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw images from an energy by short chains, reconstruct test images, interpolate.

    K Langevin steps from uniform noise, their own noise held fixed, are a generator. Writes
    samples.png and samples.safetensors, reconstructions.png, interpolations.png, and the numbers.
    """

    energy: Annotated[str, tyro.conf.Positional]
    """A shipped defense, a defense folder, hf://owner/name, or the folder that train-ebm wrote."""
    out: Path
    """Folder for pictures, images and numbers."""
    count: int = 64
    """Images to draw."""
    steps: int | None = None
    """Langevin steps K; as long as a chain lives in learning if not given, else the defense's."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each step (MALA)."""
    reconstruct: int = 0
    """Reconstruct so many test images by the starts whose chains end nearest to them."""
    updates: int = 200
    """Updates of those starts."""
    learning_rate: float = 0.05
    """Adam's learning rate in that, in [-1, 1] units."""
    interpolate: int = 0
    """Draw so many lines of images between two starts each."""
    between: int = 10
    """Images a line."""
    distance: Literal["none", "classifier", "inception"] = "none"
    """Fréchet distance of the samples from as many test images: in the features of --classifier, or
    FID itself (extra fid, and Inception's weights)."""
    classifier: str = "fashion-mnist"
    """The defense whose undefended classifier has those features."""
    data: str = "fashion-mnist-sample"
    """Data set of the test images."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of starts and noise."""

    def run(self) -> int:
        """Draw, reconstruct, interpolate, measure."""
        if self.count < 1 or min(self.reconstruct, self.interpolate) < 0:
            raise UsageError("count must be 1 or more, reconstruct and interpolate 0 or more.")
        subject, device = subject_of(self.energy), resolve_device(self.device)
        model = self._model(subject, device)
        out = writable_folder(self.out)
        samples = torch.cat(
            [model.sample(min(AT_ONCE, self.count - i), i) for i in range(0, self.count, AT_ONCE)]
        )
        save_grid(samples[: COLUMNS**2].split(COLUMNS), out / "samples.png", SCALE)
        save_tensors(out / "samples.safetensors", {"images": (samples + 1.0) / 2.0})
        found: dict[str, object] = {
            "energy": self.energy,
            "steps": model.settings.steps,
            "seed": self.seed,
        }
        found |= self._reconstructions(model, out) | self._interpolations(model, out)
        found |= self._distance(model, samples)
        write_text(out / FOUND, tomli_w.dumps(found))
        print(f"{self.count} images by {model.settings.steps} Langevin steps are in {out}")
        return 0

    def _model(self, subject: Subject, device: torch.device) -> ShortRun:
        shape = LangevinPurifier(subject.energy).image_shape
        if shape is None:
            raise UsageError(f"{self.energy} does not say of what size its images are.")
        steps = subject.learned_steps if self.steps is None else self.steps
        adjusted = self.adjusted or subject.langevin.adjusted
        chain = replace(subject.langevin, steps=steps, adjusted=adjusted)
        energy = subject.energy.to(device).eval()
        return ShortRun(energy=energy, settings=chain, shape=shape, seed=self.seed, device=device)

    def _images(self, model: ShortRun, count: int) -> Tensor:
        """Return test images in [0, 1]."""
        wanted = wanted_by(LangevinPurifier(model.energy))
        source = self.photos.open(self.data, "test", self.data_root, wanted)
        return source.take(count).images.to(model.device)

    def _reconstructions(self, model: ShortRun, out: Path) -> dict[str, object]:
        if not self.reconstruct:
            return {}
        images = self._images(model, self.reconstruct) * 2.0 - 1.0
        found = model.reconstruct(images, updates=self.updates, learning_rate=self.learning_rate)
        rows = [
            row
            for parts in zip(
                *(x.split(COLUMNS) for x in (images, found.starts, found.images)), strict=True
            )
            for row in parts
        ]
        save_grid(rows, out / "reconstructions.png", SCALE)
        before, after = float(found.errors[0].mean()), float(found.errors[-1].mean())
        print(
            f"reconstruction of {len(images)} test images: mean squared error {after:.4f} a pixel "
            f"in [-1, 1] units, {before:.4f} from random starts"
        )
        return {"reconstruction": {"images": len(images), "error": after, "random": before}}

    def _interpolations(self, model: ShortRun, out: Path) -> dict[str, object]:
        if self.interpolate:
            n = self.interpolate
            lines = model.interpolate(
                model.starts(n), model.starts(n, n), self.between, model.noise(n)
            )
            save_grid([*lines.transpose(0, 1)], out / "interpolations.png", SCALE)
        return {}

    def _distance(self, model: ShortRun, samples: Tensor) -> dict[str, object]:
        if self.distance == "none":
            return {}
        real, made = self._images(model, self.count), ((samples + 1.0) / 2.0).clamp(0.0, 1.0)
        if self.distance == "inception":
            name, value = "FID", inception_fid(real, made)
        else:
            features = features_of(load_defense(self.classifier).undefended.to(model.device))
            name = f"Fréchet distance in the features of {self.classifier}'s classifier"
            value = frechet_distance(features(real), features(made))
        print(f"{name}, {len(made)} samples, {len(real)} test images: {value:.2f}")
        return {"distance": {"name": name, "value": value, "samples": len(made), "of": len(real)}}
