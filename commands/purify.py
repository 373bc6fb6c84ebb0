"""`ebm-defense purify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ebm_defense.commands.options import Device, make_purifier, put_on, resolve_device
from ebm_defense.errors import UsageError
from ebm_defense.eval.reporting.pictures import draw_strip, film_strip
from ebm_defense.files import atomic, writable_folder
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import LangevinPurifier, Purifier

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
PICTURED = 8
BATCH = 400


@dataclass(frozen=True, kw_only=True)
class Purify:
    """Purify image files and draw a film strip of the first few on their way.

    Writes one PNG an image, under its own name, and film_strip.png into OUT.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them."""
    out: Path
    """Folder for the purified images; not the images' own."""
    purifier: str = "fashion-mnist"
    """A shipped defense, a folder, a baseline (jpeg:75) or package.module:factory."""
    langevin_steps: int | None = None
    """Langevin steps K, instead of the purifier's own."""
    size: int | None = None
    """Resize images to this height and width first."""
    channels: int | None = None
    """1 for grey, 3 for colour; as the purifier's energy wants if not given."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> int:
        """Read, purify, write."""
        files = find_images(self.images)
        device = resolve_device(self.device)
        purifier = put_on(make_purifier(self.purifier, self.langevin_steps), device)
        out = writable_folder(self.out)
        if any(file.parent.resolve() == out.resolve() for file in files):
            raise UsageError(f"{out} holds the images themselves; name another --out.")
        images = self._read(files, purifier).to(device)
        purified = self._purify(purifier, images)
        for file, image in zip(files, purified, strict=True):
            write_image(image, out / f"{file.stem}.png")
        strip = [("original", images[:PICTURED]), *self._strip(purifier, images, purified)]
        draw_strip(strip, out / "film_strip.png")
        print(f"{len(files)} purified images and film_strip.png are in {out}")
        return 0

    def _read(self, files: list[Path], purifier: Purifier) -> Tensor:
        settings = getattr(getattr(purifier, "energy", None), "settings", None)
        channels: int = self.channels or getattr(settings, "channels", None) or 3
        images = [read_image(file, channels, self.size) for file in files]
        shapes = {tuple(image.shape[1:]) for image in images}
        wanted = getattr(settings, "image_size", None)
        if len(shapes) > 1 or (wanted and shapes != {(wanted, wanted)}):
            found = ", ".join(f"{w}x{h}" for h, w in sorted(shapes))
            need = f"{wanted}x{wanted}" if wanted else "one size"
            raise UsageError(f"the images must be {need}, but are {found}; resize with --size.")
        return torch.stack(images)

    def _purify(self, purifier: Purifier, images: Tensor) -> Tensor:
        keys = chain_keys(self.seed, "purify", range(len(images)), range(1))[0].to(images.device)
        parts = zip(images.split(BATCH), keys.split(BATCH), strict=True)
        with torch.no_grad():
            try:
                return torch.cat([purifier(x, noise=KeyedNoise(k)) for x, k in parts])
            except (RuntimeError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                first = str(error).splitlines()[0]
                raise UsageError(f"the purifier cannot take these images: {first}") from error

    def _strip(
        self, purifier: Purifier, images: Tensor, purified: Tensor
    ) -> list[tuple[str, Tensor]]:
        if isinstance(purifier, LangevinPurifier):
            return film_strip(purifier, images[:PICTURED], self.seed)
        return [("purified", purified[:PICTURED])]


def find_images(paths: tuple[Path, ...]) -> list[Path]:
    """Return the image files among paths and in folders, or raise a `UsageError`."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist.")
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [p for p in inside if p.suffix.lower() in SUFFIXES]
    if not files:
        raise UsageError(f"there are no images there; known are {', '.join(sorted(SUFFIXES))}.")
    names = [f.stem for f in files]
    if len(set(names)) < len(names):
        raise UsageError("two images have the same name; purify their folders one by one.")
    return files


def read_image(path: Path, channels: int, size: int | None) -> Tensor:
    """Read an image file as `[C, H, W]` in [0, 1]."""
    if channels not in (1, 3):
        raise UsageError(f"channels must be 1 or 3, not {channels}.")
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"{path} is no image that can be read ({error}).") from error
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def write_image(image: Tensor, path: Path) -> None:
    """Write `[C, H, W]`, clamped to [0, 1], as an 8-bit image file."""
    pixels = (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    with atomic(path) as partial:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(partial)
