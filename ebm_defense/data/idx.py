"""The idx files of MNIST and of data sets that are made like it."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm_defense.data.sampling import Images
from ebm_defense.errors import UsageError

UNSIGNED_BYTE = 8
"""The type code of an idx header whose values are unsigned bytes, the only one in use here."""
HALVES = {True: "train", False: "t10k"}
KINDS = {"images": 3, "labels": 1}
"""By what a file holds, how many axes it has."""


def find_pair(folder: Path, train: bool) -> tuple[Path, Path] | None:
    """Return the images' and labels' files of one half in a folder; None where neither is there.

    Raises:
        UsageError: one of the two is missing.
    """
    images, labels = (_find(folder, f"{HALVES[train]}-{kind}", n) for kind, n in KINDS.items())
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        missing = "images" if images is None else "labels"
        raise UsageError(
            f"{images or labels} lies there without its {missing}, "
            f"{HALVES[train]}-{missing}-idx{KINDS[missing]}-ubyte; put the file beside it."
        )
    return images, labels


def _find(folder: Path, stem: str, axes: int) -> Path | None:
    # Some mirrors write a dot where the others have a hyphen.
    names = (f"{stem}{mark}idx{axes}-ubyte{gz}" for mark in "-." for gz in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_pair(images: Path, labels: Path) -> Images:
    """Read images and their labels, raw or gzipped.

    Raises:
        UsageError: a damaged file, or files of unlike count; it is named.
    """
    pixels, classes = read_idx(images, KINDS["images"]), read_idx(labels, KINDS["labels"])
    if len(pixels) != len(classes):
        raise UsageError(
            f"{images} holds {len(pixels):,} images, but {labels} {len(classes):,} labels; restore "
            "both from one source."
        )
    return Images(pixels[:, None].float() / 255.0, classes.long())


def read_idx(path: Path, axes: int) -> Tensor:
    """Read one idx file of unsigned bytes with so many axes.

    Raises:
        UsageError: it is truncated, too long, or no such file.
    """
    content = _content(path)
    header = 4 + 4 * axes
    if content[:4] != bytes((0, 0, UNSIGNED_BYTE, axes)) or len(content) < header:
        raise UsageError(
            f"{path} is damaged: it does not begin as an idx file of {axes} axes does; restore it."
        )
    shape = struct.unpack(f">{axes}I", content[4:header])
    wanted, found = math.prod(shape), len(content) - header
    if wanted != found:
        raise UsageError(
            f"{path} is damaged: its header promises {wanted:,} bytes of "
            f"{' x '.join(map(str, shape))}, but {found:,} follow; restore it."
        )
    values = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(values.copy())


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is damaged ({error}); restore it.") from error
