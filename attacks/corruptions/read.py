"""Corrupted images in files: folders laid out as CIFAR-10-C is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.attacks.corruptions.made import SEVERITIES
from ebm_defense.data import Images
from ebm_defense.errors import UsageError

LABELS = "labels.npy"
Array = np.ndarray[Any, Any]


def corruptions_in(folder: str | Path) -> list[str]:
    """Return the names of a folder's corruptions.

    Raises:
        UsageError: no labels or no other .npy file there.
    """
    path = Path(folder).expanduser()
    names = sorted(p.stem for p in path.glob("*.npy") if p.name != LABELS)
    if not names or not (path / LABELS).is_file():
        raise UsageError(
            f"{path} is no folder of corruptions: it needs {LABELS} and one CORRUPTION.npy each."
        )
    return names


def read_corrupted(
    folder: str | Path, name: str, severity: int, rows: Tensor | None = None
) -> Images:
    """Read one corruption at one severity from a folder like CIFAR-10-C.

    Args:
        folder: with `NAME.npy`, uint8 `[5·N, H, W, C]` or `[5·N, H, W]`, severity after severity,
            and `labels.npy`, `[5·N]` or `[N]`.
        name: the corruption.
        severity: 1 to 5.
        rows: which of the N images; all if not given.

    Raises:
        UsageError: a file that is missing, damaged or of another shape or type.
    """
    pixels, labels = _open(folder, name)
    if severity not in SEVERITIES:
        raise UsageError(f"a severity is a whole number from 1 to 5, not {severity}.")
    count, rest = divmod(len(pixels), len(SEVERITIES))
    if rest or len(labels) not in (count, len(pixels)):
        raise UsageError(
            f"{name}.npy in {folder} holds {len(pixels)} images and {LABELS} {len(labels)} labels; "
            "there must be as many images for each of five severities."
        )
    chosen = np.arange(count) if rows is None else rows.numpy()
    first = (severity - 1) * count
    return Images(_pixels(pixels[first + chosen]), torch.from_numpy(labels[chosen].astype("int64")))


def _open(folder: str | Path, name: str) -> tuple[Array, Array]:
    path = Path(folder).expanduser()
    names = corruptions_in(path)
    if name not in names:
        raise UsageError(f"{path} holds no {name}.npy; it holds {', '.join(names)}.")
    pixels, labels = _load(path / f"{name}.npy"), _load(path / LABELS)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or labels.ndim != 1:
        raise UsageError(
            f"{path / name}.npy holds {pixels.dtype} of shape {pixels.shape} and {LABELS} shape "
            f"{labels.shape}; there must be uint8 images of 3 or 4 dimensions and plain labels."
        )
    return pixels, labels


def _load(file: Path) -> Array:
    try:
        # Mapped, since one published file is 150 MB and a sample of it is wanted.
        found: Array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{file} is damaged or no plain .npy file ({error}).") from error
    return found


def _pixels(pixels: Array) -> Tensor:
    with_channels = pixels if pixels.ndim == 4 else pixels[..., None]
    return torch.from_numpy(np.array(with_channels)).permute(0, 3, 1, 2).float() / 255.0
