"""Data sets by name: images `[N, C, H, W]` float32 in [0, 1] and labels `[N]` int64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ebm_defense.data.folder import FolderSettings, open_folder
from ebm_defense.data.photos import Framing, read_photo
from ebm_defense.data.published import (
    Load,
    digits,
    fashion_mnist_sample,
    from_idx,
    from_torchvision,
)
from ebm_defense.data.roots import cache_folder, data_roots, named_root
from ebm_defense.data.sampling import (
    SPLITS,
    VALIDATION_SHARE,
    Images,
    Source,
    held_out,
    in_memory,
    stratified_order,
)
from ebm_defense.errors import UsageError

__all__ = [
    "DATASETS",
    "SPLITS",
    "DataSet",
    "FolderSettings",
    "Framing",
    "Images",
    "Source",
    "cache_folder",
    "customary_eps",
    "data_roots",
    "dataset",
    "load_data",
    "open_data",
    "read_photo",
    "stratified_order",
]

Open = Callable[[Path | None, str, FolderSettings | None], Source]
"""(the data folder that was named, split, how photos are read) → the split."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is known of a data set before it is read.

    Attributes:
        open: opens one of its splits.
        classes: the names of the classes, in label order; empty where only the files know.
        splits: which of `SPLITS` it has.
        flip: whether a mirrored image keeps its class.
        eps: the customary Linf perturbation, in [0, 1] units.
        other_eps: the customary perturbations in other norms, where there are any.
    """

    open: Open
    classes: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS
    flip: bool = True
    eps: float = 8 / 255
    other_eps: Mapping[str, float] = field(default_factory=dict)


def customary_eps(name: str, norm: str = "Linf") -> float:
    """Return a data set's customary perturbation in a norm, in [0, 1] units.

    Raises:
        UsageError: an unknown data set, or none that is customary.
    """
    data = dataset(name)
    known = {"linf": data.eps} | {other.lower(): eps for other, eps in data.other_eps.items()}
    if norm.lower() not in known:
        raise UsageError(f"{name} has no customary eps in {norm}; give one, in [0, 1] units.")
    return known[norm.lower()]


def load_data(
    name: str,
    split: str = "test",
    limit: int | None = None,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    folder: FolderSettings | None = None,
) -> Images:
    """Load a data set by name, all of it or a stratified sample.

    Args:
        name: a name in `DATASETS`, or "folder" with `root` a tree of class folders.
        split: "train", "val" (a fixed stratified twelfth of the training half, which "train"
            leaves out) or "test"; see `open_folder` for the splits of a folder.
        limit: how many images; class shares are kept to within one image
            (nearly, where the classes differ in size).
        root: the data folder; see `data_roots` for where else is looked. Damaged files in the first
            place that has the data set are refused; only where it is absent is looked further.
        seed: which sample `limit` draws.
        folder: how photos are read, of data set "folder" alone.

    Returns:
        images `[N, C, H, W]` float32 in [0, 1] and labels `[N]` int64.

    Raises:
        UsageError: an unknown name or split, data that are damaged, or neither here nor
            downloadable, or photos that cannot be read.
    """
    return open_data(name, split, root=root, folder=folder).take(limit, seed)


def open_data(
    name: str,
    split: str = "test",
    *,
    root: str | Path | None = None,
    folder: FolderSettings | None = None,
) -> Source:
    """Open a split of a data set: its labels and class names, and images when they are asked for.

    The arguments, and what is raised, are as of `load_data`.
    """
    data = dataset(name)
    if split not in data.splits:
        raise UsageError(f"{name} has no split {split!r}; choose one of {', '.join(data.splits)}.")
    return data.open(None if root is None else Path(root), split, folder)


def dataset(name: str) -> DataSet:
    """Return the entry of `DATASETS`, or raise a `UsageError` that lists the names."""
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def _open_halves(
    load: Load,
    classes: tuple[str, ...],
    root: Path | None,
    split: str,
    folder: FolderSettings | None,
) -> Source:
    if folder not in (None, FolderSettings()):
        raise UsageError("only data set 'folder' takes settings of how photos are read.")
    source = in_memory(load(root, split != "test"), classes)
    if split == "test":
        return source
    return held_out(source, VALIDATION_SHARE, kept=split == "train")


def _open_folder(root: Path | None, split: str, folder: FolderSettings | None) -> Source:
    named = named_root(root)
    if named is None:
        raise UsageError("data set 'folder' needs a data root: the folder of class folders.")
    return open_folder(named, split, folder or FolderSettings())


def _halves(load: Load, classes: tuple[str, ...] = (), **known: object) -> DataSet:
    """Return a data set that comes in a training and a test half."""
    return DataSet(open=partial(_open_halves, load, classes), classes=classes, **known)  # type: ignore[arg-type]


_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_DIGITS = tuple(map(str, range(10)))

DATASETS: dict[str, DataSet] = {
    "fashion-mnist": _halves(from_idx("FashionMNIST"), _FASHION, eps=0.1),
    "fashion-mnist-sample": _halves(fashion_mnist_sample, _FASHION, splits=("test",), eps=0.1),
    "mnist": _halves(from_idx("MNIST"), _DIGITS, flip=False, eps=0.3),
    "cifar10": _halves(from_torchvision("CIFAR10"), _CIFAR10, other_eps={"L2": 0.5, "L1": 12.0}),
    "cifar100": _halves(from_torchvision("CIFAR100"), other_eps={"L2": 0.5}),
    "svhn": _halves(from_torchvision("SVHN"), _DIGITS, flip=False, other_eps={"L2": 0.5}),
    "digits": _halves(digits, _DIGITS, flip=False, eps=0.1),
    "folder": DataSet(open=_open_folder),
}
