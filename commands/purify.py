"""`ebm-defense purify`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro
from PIL import Image
from torch import Tensor

from ebm_defense.commands.options.photos import Wanted, wanted_by
from ebm_defense.commands.options.shared import (
    Device,
    make_purifier,
    put_on,
    resolve_device,
)
from ebm_defense.data.folder import is_photo, photos_in
from ebm_defense.data.photos import SUFFIXES, Framing, photo_size, read_photo
from ebm_defense.errors import UsageError
from ebm_defense.eval.reporting.figures.pictures import Strip, draw_strip, film_strip
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier
from ebm_defense.storage.files import atomic, writable_folder

PICTURED = 8
BATCH = 400
STRIP = "film_strip"


class Photo(NamedTuple):
    """An image to purify: its number, its file, what becomes of it, and its size once framed."""

    number: int
    file: Path
    target: Path
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Purify:
    """Purify image files and draw a film strip of the first few on their way.

    Writes one PNG an image into OUT, under its own name and in its own subfolder, and a film strip.
    Photos are read upright, transparent ones over the background. No input is ever replaced.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, or folders of them, which are searched to the bottom."""
    out: Path
    """Folder for the purified images; not the images' own."""
    purifier: str = "fashion-mnist"
    """A shipped defense, a folder, a baseline (jpeg:75) or package.module:factory."""
    langevin_steps: int | None = None
    """Langevin steps K, instead of the purifier's own."""
    adjusted: bool = False
    """Let a Metropolis test accept or refuse each Langevin step (MALA), and say how many pass."""
    size: int | None = None
    """First resize the shorter side to this, bicubic, and cut out the centre square."""
    channels: int | None = None
    """1 for grey, 3 for colour; as the purifier's energy wants if not given."""
    background: str = "white"
    """What transparent pixels lie on: white, grey or black."""
    skip_bad: bool = False
    """Leave out files that cannot be read, and say which."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of the noise."""

    def run(self) -> int:
        """Find, purify batch by batch, write."""
        files = find_images(self.images, self.out)
        device = resolve_device(self.device)
        purifier = put_on(
            make_purifier(self.purifier, self.langevin_steps, self.adjusted or None), device
        )
        wanted = wanted_by(purifier)
        framing = Framing(
            crop=self.size,
            channels=self.channels or wanted.channels or 3,
            background=self.background,
        )
        photos = self._photos(files, framing, wanted)
        out = writable_folder(self.out)
        strip = _free_name(out, photos)
        rows: Strip = []
        for batch in _batches(photos):
            images = torch.stack([read_photo(p.file, framing) for p in batch]).to(device)
            purified = self._purify(purifier, images, [p.number for p in batch])
            for photo, image in zip(batch, purified, strict=True):
                writable_folder(photo.target.parent)
                write_image(image, photo.target)
            rows = rows or self._strip(purifier, images[:PICTURED])
        draw_strip(rows, strip)
        for remark in self._remarks(purifier, images[:PICTURED]):
            print(remark)
        print(f"{len(photos)} purified images and {strip.name} are in {out}")
        return 0

    def _photos(self, files: dict[Path, Path], framing: Framing, wanted: Wanted) -> list[Photo]:
        """Look at every file's head, and refuse what cannot go well before any long work."""
        photos: list[Photo] = []
        for file, target in files.items():
            try:
                size = (self.size, self.size) if self.size else photo_size(file)
                if self.skip_bad:
                    read_photo(file, framing)
            except UsageError as error:
                if not self.skip_bad:
                    raise
                print(f"left out: {error}")
                continue
            photos.append(Photo(len(photos), file, target, size))
        _refuse_sizes(photos, wanted.size)
        _refuse_replacing(photos)
        return photos

    def _purify(self, purifier: Purifier, images: Tensor, numbers: list[int]) -> Tensor:
        keys = chain_keys(self.seed, "purify", numbers, range(1))[0].to(images.device)
        with torch.no_grad():
            try:
                return purifier(images, noise=KeyedNoise(keys))
            except (RuntimeError, ValueError) as error:
                if isinstance(error, UsageError):
                    raise
                first = str(error).splitlines()[0]
                raise UsageError(f"the purifier cannot take these images: {first}") from error

    def _remarks(self, purifier: Purifier, images: Tensor) -> list[str]:
        keys = chain_keys(self.seed, "film strip", range(len(images)), range(1))[0]
        return purifier.remarks(images, KeyedNoise(keys.to(images.device)))

    def _strip(self, purifier: Purifier, images: Tensor) -> Strip:
        return [("original", images), *film_strip(purifier, images, self.seed)]


def find_images(paths: tuple[Path, ...], out: Path) -> dict[Path, Path]:
    """Return the image files among paths and in folders, each with where it goes in `out`.

    Raises:
        UsageError: a path that does not exist or lies in `out`, two files that would go to one
            place, or no images at all.
    """
    found: dict[Path, Path] = {}
    here = out.expanduser().resolve()
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist.")
        home = path if path.is_dir() else path.parent
        if here in (home.resolve(), *path.resolve().parents):
            raise UsageError(f"{out} holds the images themselves; name another --out.")
        for file in photos_in(path) if path.is_dir() else [path]:
            # What an earlier run wrote below the images is none of them.
            if is_photo(file) and here not in file.resolve().parents:
                found[file] = out / file.relative_to(home).with_suffix(".png")
    if not found:
        raise UsageError(f"there are no images there; known are {', '.join(SUFFIXES)}.")
    _refuse_twins(found)
    return found


def _refuse_twins(found: dict[Path, Path]) -> None:
    first: dict[str, Path] = {}
    for file, target in found.items():
        # Some file systems take names that differ in case alone for one.
        other = first.setdefault(str(target).lower(), file)
        if other != file:
            raise UsageError(
                f"{other} and {file} would both become {target}; purify them into folders of their "
                "own."
            )


def _refuse_sizes(photos: list[Photo], wanted: int | None) -> None:
    found = sorted({photo.size for photo in photos})
    if not photos:
        raise UsageError("none of the files can be read.")
    if wanted and found != [(wanted, wanted)]:
        shown = ", ".join(f"{w}x{h}" for w, h in found[:5]) + (", …" if len(found) > 5 else "")
        raise UsageError(
            f"the images must be {wanted}x{wanted}, but are {shown}; resize with --size {wanted}."
        )


def _refuse_replacing(photos: list[Photo]) -> None:
    """Refuse to write over an input, under whatever name or link it lies there."""
    inputs = {_identity(photo.file): photo.file for photo in photos}
    for photo in photos:
        if photo.target.exists() and _identity(photo.target) in inputs:
            raise UsageError(
                f"{photo.target} is {inputs[_identity(photo.target)]}, which would be replaced; "
                "name another --out."
            )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _free_name(out: Path, photos: list[Photo]) -> Path:
    """Return a name for the film strip that no purified image has, nor an input."""
    taken = {str(photo.target).lower() for photo in photos}
    inputs = {_identity(photo.file) for photo in photos}
    names = (out / f"{STRIP}{f'-{n}' if n > 1 else ''}.png" for n in count(1))
    return next(
        name
        for name in names
        if str(name).lower() not in taken and not (name.exists() and _identity(name) in inputs)
    )


def _batches(photos: list[Photo]) -> Iterator[list[Photo]]:
    """Yield runs of photos of one size, as many as are purified at a time."""
    for _, alike in groupby(photos, key=lambda photo: photo.size):
        run = list(alike)
        yield from (run[i : i + BATCH] for i in range(0, len(run), BATCH))


def write_image(image: Tensor, path: Path) -> None:
    """Write `[C, H, W]`, clamped to [0, 1], as an 8-bit image file."""
    pixels = (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    with atomic(path) as partial:
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(partial)
