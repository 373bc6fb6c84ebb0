"""Data set `folder`: photos in class folders, with or without split folders above them."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ebm_defense.data.class_map import mapped
from ebm_defense.data.photos import CAMERAS, SUFFIXES, Framing, read_photo
from ebm_defense.data.sampling import VALIDATION_SHARE, Images, Source, held_out
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
JUNK = ("__MACOSX", "@eaDir", "Thumbs.db")
"""What operating systems leave beside photos, besides names that begin with a dot."""
SHOWN = 5
"""How many bad files a warning names."""

List = Callable[[Path], Source]
"""Opens all photos of a folder of class folders."""

_log = logging.getLogger("ebm_defense")


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """How a folder of photos is read.

    Attributes:
        framing: how each photo becomes an image.
        test_share: of a tree without split folders, the fixed stratified share that is kept for
            testing; "test" is all of it if not given, and there is nothing to train on.
        labelled: whether there must be class folders; without, photos need no class, and all that
            lie outside class folders are of class 0.
        class_map: which output of a classifier each class folder is; see `class_map.mapped`. The
            place in their natural order if not given.
        skip_bad: leave out files that cannot be read, and say which.

    Raises:
        UsageError: a share outside [0, 1).
    """

    framing: Framing = field(default_factory=Framing)
    test_share: float | None = None
    labelled: bool = True
    class_map: str | None = None
    skip_bad: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.test_share is not None and not 0 <= self.test_share < 1:
            raise UsageError(f"the test share must lie in [0, 1), not {self.test_share}.")


def open_folder(root: Path, split: str, settings: FolderSettings) -> Source:
    """Open a folder of class folders, or of split folders of them; nothing is decoded yet.

    Split folders are train, val and test, or val alone beside train, which is then the test split
    (as ImageNet is laid out); a val split that has no folder is a fixed stratified twelfth of the
    training images. Classes are numbered in the natural order of their folders' names over all
    split folders, "2" before "10"; hidden names are skipped, folders within class folders read.

    Raises:
        UsageError: no class folders, an empty one, or a split that is not there.
    """
    folders = _split_folders(root, settings.labelled)
    names = _class_names(list(folders.values()) or [root])
    if not names and settings.labelled:
        raise UsageError(f"{root} is no folder of class folders with images in them.")
    if settings.labelled and not folders:
        _refuse_wrapper(root, names)
    numbers, classes = mapped(names or [""], settings.class_map)
    listed = partial(
        _listed, names=names or [""], numbers=numbers, classes=classes, settings=settings
    )
    if not folders:
        return _share_of(listed(root), root, split, settings.test_share)
    if settings.test_share is not None:
        raise UsageError(f"{root} has split folders already, so it needs no test share.")
    return _split_of(folders, root, split, listed)


def _split_folders(root: Path, labelled: bool) -> dict[str, Path]:
    """Return a tree's split folders by split; none where its folders are classes."""
    by_name = {p.name.lower(): p for p in visible(root) if p.is_dir()}
    found = {s: by_name[n] for s, ns in SPLIT_NAMES.items() for n in ns if n in by_name}
    sure = "train" in found or len(found) > 1 or len(found) == len(by_name)
    # A class may be called "train" or "test"; a split folder holds folders, a class photos.
    nested = any(any(p.is_dir() for p in visible(folder)) for folder in found.values())
    return found if sure and (nested or not labelled) else {}


def _class_names(folders: list[Path]) -> list[str]:
    """Return the class folders' names over all of these folders, in natural order."""
    return sorted({named(p) for f in folders for p in visible(f) if p.is_dir()}, key=natural)


def _refuse_wrapper(root: Path, names: list[str]) -> None:
    """Refuse a folder whose only class holds folders of photos, which are the classes."""
    if len(names) > 1:
        return
    inside = visible(root / names[0]) if (root / names[0]).is_dir() else []
    folders = [p for p in inside if p.is_dir() and next(photos_in(p), None)]
    if len(folders) > 1 and len(folders) == len([p for p in inside if p.is_dir() or is_photo(p)]):
        raise UsageError(
            f"{root} holds one folder, {names[0]}, and that the folders of photos "
            f"({', '.join(p.name for p in folders[:3])}, …); name {root / names[0]} instead."
        )


def _split_of(folders: dict[str, Path], root: Path, split: str, listed: List) -> Source:
    if "test" not in folders and "val" in folders:
        folders = {"test": folders["val"], **{k: v for k, v in folders.items() if k != "val"}}
    if split in folders and not (split == "train" and "val" not in folders):
        return listed(folders[split])
    if split == "test" or "train" not in folders:
        there = ", ".join(sorted(folder.name for folder in folders.values()))
        raise UsageError(f"{root} has no {split} folder, only {there}; add one of class folders.")
    return held_out(listed(folders["train"]), VALIDATION_SHARE, kept=split == "train")


def _share_of(everything: Source, root: Path, split: str, share: float | None) -> Source:
    if share is None:
        if split == "test":
            return everything
        raise UsageError(
            f"{root} has no {split} folder: put its class folders under train and test, or give "
            "--test-share 0.2, here and when you evaluate, to keep a fixed fifth for testing."
        )
    if split == "test":
        return held_out(everything, share, kept=False)
    rest = held_out(everything, share, kept=True)
    return held_out(rest, VALIDATION_SHARE, kept=split == "train")


def _listed(
    folder: Path,
    names: list[str],
    numbers: list[int],
    classes: tuple[str, ...],
    settings: FolderSettings,
) -> Source:
    """List a folder's photos by class."""
    files: list[Path] = []
    labels: list[int] = []
    homes = {named(p): p for p in visible(folder) if p.is_dir()}
    if not homes and settings.labelled:
        raise UsageError(
            f"{folder} holds no class folders; sort its photos into {', '.join(names[:3])}, …"
        )
    for name, number in zip(names, numbers, strict=True):
        home = homes.get(name, folder / name)
        inside = sorted(photos_in(home), key=lambda p: natural(str(p)))
        if not inside and home.is_dir() and not settings.skip_bad:
            raise UsageError(
                f"{home} is a class folder without images; put some in or remove it "
                f"(known are {', '.join(SUFFIXES)})."
            )
        files += inside
        labels += [number] * len(inside)
    known = torch.tensor(labels, dtype=torch.int64)
    read = partial(_read, files, known, settings)
    return Source(labels=known, read=read, classes=classes)


def _read(files: list[Path], labels: Tensor, settings: FolderSettings, rows: Tensor) -> Images:
    """Decode these rows' photos side by side."""
    chosen = [files[i] for i in rows.tolist()]
    decode = _tried if settings.skip_bad else read_photo
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes without the lock
        images = list(pool.map(partial(decode, framing=settings.framing), chosen))
    good = [i for i, image in enumerate(images) if isinstance(image, Tensor)]
    if bad := [str(image) for image in images if not isinstance(image, Tensor)]:
        more = f" … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        _log.warning("%d bad files are left out: %s%s", len(bad), " ".join(bad[:SHOWN]), more)
    kept = [image for image in images if isinstance(image, Tensor)]
    if not kept:
        return Images(torch.empty((0, settings.framing.channels, 0, 0)), labels[:0])
    _refuse_unlike(kept, [chosen[i] for i in good])
    return Images(torch.stack(kept), labels[rows[good]])


def _tried(path: Path, framing: Framing) -> Tensor | UsageError:
    try:
        return read_photo(path, framing)
    except UsageError as error:
        return error


def _refuse_unlike(images: list[Tensor], files: list[Path]) -> None:
    first = images[0].shape
    for image, file in zip(images, files, strict=True):
        if image.shape != first:
            (_, h, w), (_, other_h, other_w) = first, image.shape
            raise UsageError(
                f"the photos differ in size ({files[0]} has {w}x{h} pixels, {file} "
                f"{other_w}x{other_h}); give --crop to cut all to one size."
            )


def photos_in(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield the image files of a folder and of the folders in it, skipping hidden names.

    Args:
        folder: where to look; a link back to a folder that it lies in is not followed.
        above: the folders it lies in, resolved.
    """
    here = folder.resolve() if folder.is_dir() else None
    if here is None or here in above:
        return
    for path in visible(folder):
        if path.is_dir():
            yield from photos_in(path, above | {here, *here.parents})
        elif is_photo(path):
            yield path


def is_photo(path: Path) -> bool:
    """Whether a file is a photo by its name, though perhaps one that only a plugin can read."""
    return path.suffix.lower() in (*SUFFIXES, *CAMERAS)


def named(path: Path) -> str:
    """Return a file's name as it is typed: macOS takes accents apart, "é" into two characters."""
    return unicodedata.normalize("NFC", path.name)


def visible(folder: Path) -> list[Path]:
    """Return what lies in a folder, in natural order, without hidden names."""
    inside = (p for p in folder.iterdir() if not p.name.startswith(".") and p.name not in JUNK)
    return sorted(inside, key=lambda p: natural(p.name))


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return what orders names as people do: numbers in them by value, "2" before "10"."""
    parts = [p for p in re.split(r"(\d+)", name) if p]
    key = [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts]
    return [*key, (-1, 0, name)]
