"""Data sets by name: images `[N, C, H, W]` float32 in [0, 1] and labels `[N]` int64."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_defense._torchvision import torchvision
from ebm_defense.errors import UsageError
from ebm_defense.files import atomic

SPLITS = ("train", "val", "test")
SPLIT_SEED = 20_210_501
VALIDATION_SHARE = 1 / 12
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Images(NamedTuple):
    """Images `[N, C, H, W]` in [0, 1] and their labels `[N]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What is known of a data set before it is read.

    Attributes:
        load: (root, train) -> Images, all of the training or test half.
        classes: the names of the classes, in label order; empty where only the files know.
        splits: which of `SPLITS` it has.
        flip: whether a mirrored image keeps its class.
        eps: the customary Linf perturbation, in [0, 1] units.
    """

    load: Callable[[Path, bool], Images]
    classes: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS
    flip: bool = True
    eps: float = 8 / 255


def load_data(
    name: str,
    split: str = "test",
    limit: int | None = None,
    *,
    root: str | Path | None = None,
    seed: int = 0,
) -> Images:
    """Load a data set by name, all of it or a stratified sample.

    Args:
        name: a name in `DATASETS`, or "folder" with `root` an ImageFolder tree.
        split: "train", "val" (a fixed stratified twelfth of the training half, which "train"
            leaves out) or "test".
        limit: how many images; class shares are kept to within one image
            (nearly, where the classes differ in size).
        root: the data folder; see `data_roots` for where else is looked.
        seed: which sample `limit` draws.

    Returns:
        images `[N, C, H, W]` float32 in [0, 1] and labels `[N]` int64.

    Raises:
        UsageError: an unknown name or split, or data that are neither here nor downloadable.
    """
    data = dataset(name)
    if split not in data.splits:
        raise UsageError(f"{name} has no split {split!r}; choose one of {', '.join(data.splits)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"the number of images must be at least 1, not {limit}.")
    found = data.load(_find_root(name, root), split != "test")
    if split != "test" and "val" in data.splits:
        found = _validation_split(found, split)
    return found if limit is None else _stratified(found, limit, seed)


def dataset(name: str) -> DataSet:
    """Return the entry of `DATASETS`, or raise a `UsageError` that lists the names."""
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}.")
    return DATASETS[name]


def data_roots(root: str | Path | None = None) -> list[Path]:
    """Return where data are looked for: `root`, $EBM_DEFENSE_DATA, the platform's cache."""
    named = [root, os.environ.get("EBM_DEFENSE_DATA")]
    return [Path(r).expanduser() for r in named if r] + [cache_folder()]


def cache_folder() -> Path:
    """Return the platform's cache folder for data and downloads."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ebm-defense"


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Order indices so that every prefix holds the classes in their shares.

    To within one image where classes are of one size, nearly so where they are not.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    rank = torch.zeros(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        jitter = torch.rand(1, generator=generator, dtype=torch.float64)
        rank[members] = (torch.arange(len(members)) + jitter) / len(members)
    return rank.argsort()


def _stratified(data: Images, limit: int, seed: int) -> Images:
    if limit > len(data.labels):
        raise UsageError(f"{limit} images asked for, but there are only {len(data.labels)}.")
    chosen = stratified_order(data.labels, seed)[:limit]
    return Images(data.images[chosen], data.labels[chosen])


def _validation_split(data: Images, split: str) -> Images:
    order = stratified_order(data.labels, SPLIT_SEED)
    size = round(len(order) * VALIDATION_SHARE)
    chosen = order[:size] if split == "val" else order[size:].sort().values
    return Images(data.images[chosen], data.labels[chosen])


def _find_root(name: str, root: str | Path | None) -> Path:
    if root is not None and not Path(root).expanduser().is_dir():
        raise UsageError(f"the data folder {root} does not exist; create it or name another.")
    if name == "folder" and root is None:
        raise UsageError("data set 'folder' needs a data root: the folder of class folders.")
    return data_roots(root)[0]


def _from_torchvision(cls: str) -> Callable[[Path, bool], Images]:
    def load(root: Path, train: bool) -> Images:
        constructor = getattr(torchvision("datasets"), cls)
        half = {"split": "train" if train else "test"} if cls == "SVHN" else {"train": train}
        for place in [root, *data_roots()]:
            try:
                return _tensors(constructor(str(place), download=False, **half))
            except RuntimeError:
                continue  # torchvision's word for "not found or corrupted"
        return _tensors(_download(constructor, root, cls, half))

    return load


def _download(constructor: Any, root: Path, cls: str, options: dict[str, Any]) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return constructor(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{cls} is neither in {root} nor downloadable ({error}); put torchvision's files into "
            "a folder and name it with --data-root or $EBM_DEFENSE_DATA"
            + (", or install Debian's package dataset-fashion-mnist." if "Fashion" in cls else ".")
        ) from error


def _tensors(data: Any) -> Images:
    pixels = torch.as_tensor(np.asarray(data.data))
    labels = torch.as_tensor(np.asarray(getattr(data, "targets", getattr(data, "labels", None))))
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[1] != 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous().float() / 255.0, labels.long())


def _fashion_mnist(root: Path, train: bool) -> Images:
    load = _from_torchvision("FashionMNIST")
    own = root != cache_folder() and (root / "FashionMNIST" / "raw").is_dir()
    if DEBIAN_FASHION_MNIST.is_dir() and not own:
        _unpack_debian(cache_folder() / "FashionMNIST" / "raw")
        return load(cache_folder(), train)
    return load(root, train)


def _unpack_debian(raw: Path) -> None:
    """Unzip Debian's recompressed files, whose checksums torchvision would refuse."""
    raw.mkdir(parents=True, exist_ok=True)
    for packed in DEBIAN_FASHION_MNIST.glob("*.gz"):
        target = raw / packed.stem
        if target.exists():
            continue
        try:
            with atomic(target) as partial, gzip.open(packed) as source:
                partial.write_bytes(source.read())
        except (OSError, EOFError) as error:
            raise UsageError(
                f"{packed} cannot be unpacked ({error}); reinstall dataset-fashion-mnist."
            ) from error


def _fashion_mnist_sample(root: Path, train: bool) -> Images:
    with files("ebm_defense.checkpoints").joinpath("fashion_mnist_sample.npz").open("rb") as file:
        sample = np.load(file, allow_pickle=False)
        images = torch.from_numpy(sample["images"]).float()[:, None] / 255.0
        return Images(images, torch.from_numpy(sample["labels"]).long())


def _digits(root: Path, train: bool) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "data set 'digits' needs scikit-learn; pip install scikit-learn."
        ) from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 16.0
    labels = torch.from_numpy(bunch.target).long()
    order = stratified_order(labels, SPLIT_SEED)
    held_out = len(order) // 5
    chosen = order[held_out:] if train else order[:held_out]
    return Images(images[chosen], labels[chosen])


def _folder(root: Path, train: bool) -> Images:
    transforms = torchvision("transforms")
    try:
        found = torchvision("datasets").ImageFolder(str(root), transforms.ToTensor())
    except FileNotFoundError as error:
        raise UsageError(f"{root} is no folder of class folders with images in them.") from error
    images = [image for image, _ in found]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise UsageError(
            f"the images under {root} differ in size ({len(shapes)} sizes); resize them."
        )
    return Images(torch.stack(images), torch.tensor(found.targets))


_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_DIGITS = tuple(map(str, range(10)))

DATASETS: dict[str, DataSet] = {
    "fashion-mnist": DataSet(load=_fashion_mnist, classes=_FASHION, eps=0.1),
    "fashion-mnist-sample": DataSet(
        load=_fashion_mnist_sample, classes=_FASHION, splits=("test",), eps=0.1
    ),
    "cifar10": DataSet(load=_from_torchvision("CIFAR10"), classes=_CIFAR10),
    "cifar100": DataSet(load=_from_torchvision("CIFAR100")),
    "svhn": DataSet(load=_from_torchvision("SVHN"), classes=_DIGITS, flip=False),
    "digits": DataSet(load=_digits, classes=_DIGITS, flip=False, eps=0.1),
    "folder": DataSet(load=_folder, splits=("test",)),
}
