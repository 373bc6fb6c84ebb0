"""The data sets that everybody uses: found on this machine, or downloaded by torchvision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_defense._torchvision import torchvision
from ebm_defense.data.idx import find_pair, read_pair
from ebm_defense.data.roots import data_roots, named_root
from ebm_defense.data.sampling import SPLIT_SEED, Images, stratified_order
from ebm_defense.errors import UsageError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

Load = Callable[[Path | None, bool], Images]
"""(the data folder that was named, training half?) → all of that half."""


def from_idx(cls: str) -> Load:
    """Return what loads a data set of idx files, which torchvision knows by this name."""

    def load(root: Path | None, train: bool) -> Images:
        named = named_root(root)
        for folder in _idx_folders(cls, named):
            if (pair := find_pair(folder, train)) is not None:
                return read_pair(*pair)
        _download(cls, data_roots(named)[0], {"train": train})
        pair = find_pair(data_roots(named)[0] / cls / "raw", train)
        assert pair is not None
        return read_pair(*pair)

    return load


def _idx_folders(cls: str, named: Path | None) -> Iterator[Path]:
    """Yield where a data set's idx files may lie; only a folder that was named has them bare."""
    if named is not None:
        yield from (named / cls / "raw", named)
    yield from (root / cls / "raw" for root in data_roots())
    if cls == "FashionMNIST":
        yield DEBIAN_FASHION_MNIST


def from_torchvision(cls: str) -> Load:
    """Return what loads one of torchvision's data sets of colour images."""

    def load(root: Path | None, train: bool) -> Images:
        constructor = getattr(torchvision("datasets"), cls)
        half = {"split": "train" if train else "test"} if cls == "SVHN" else {"train": train}
        roots = data_roots(named_root(root))
        for place in roots:
            try:
                return _tensors(constructor(str(place), download=False, **half))
            except RuntimeError:  # torchvision's word for "not found or corrupted"
                if _packed(constructor, place):
                    return _tensors(_download(cls, place, half))
                _refuse_damage(constructor, place, half)
        return _tensors(_download(cls, roots[0], half))

    return load


def _packed(constructor: Any, root: Path) -> bool:
    """Return whether a data set's whole archive lies in a folder, so that it need be unpacked."""
    archive = root / str(getattr(constructor, "filename", ""))
    return archive.is_file() and _md5(archive) == constructor.tgz_md5


def _refuse_damage(constructor: Any, root: Path, half: dict[str, Any]) -> None:
    """Refuse a folder that holds some files of a data set, but not all of them whole.

    Raises:
        UsageError: the first one that is damaged or missing.
    """
    expected = dict(_files(constructor, root, half))
    present = [file for file in expected if file.is_file()]
    if not present:
        return
    for file, md5 in expected.items():
        if not file.is_file():
            if file.name != getattr(constructor, "filename", None):
                raise UsageError(f"{file} is missing beside {present[0].name}; restore it.")
        elif _md5(file) != md5:
            raise UsageError(
                f"{file} is damaged: its MD5 is not the published one; restore it, or remove it so "
                "that the data are looked for elsewhere."
            )


def _files(constructor: Any, root: Path, half: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield the files that torchvision wants in a folder, and their MD5s."""
    if "split" in half:  # SVHN keeps one file a split, in the folder itself
        _, name, md5 = getattr(constructor, "split_list", {}).get(half["split"], [""] * 3)
        if name:
            yield root / name, md5
        return
    if hasattr(constructor, "filename"):
        yield root / constructor.filename, constructor.tgz_md5
    inside = root / str(getattr(constructor, "base_folder", ""))
    for name, md5 in (
        *getattr(constructor, "train_list", ()),
        *getattr(constructor, "test_list", ()),
    ):
        yield inside / name, md5
    if meta := getattr(constructor, "meta", None):
        yield inside / meta["filename"], meta["md5"]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(cls: str, root: Path, options: dict[str, Any]) -> Any:
    try:
        root.mkdir(parents=True, exist_ok=True)
        constructor = getattr(torchvision("datasets"), cls)
        return constructor(str(root), download=True, **options)
    except (OSError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        raise UsageError(
            f"{cls} is neither in {root} nor downloadable ({said}); put torchvision's files into "
            "a folder and name it with --data-root or $EBM_DEFENSE_DATA"
            + (", or install Debian's package dataset-fashion-mnist." if "Fashion" in cls else ".")
        ) from error


def _tensors(data: Any) -> Images:
    pixels = torch.as_tensor(np.asarray(data.data))
    labels = torch.as_tensor(np.asarray(getattr(data, "targets", getattr(data, "labels", None))))
    if pixels.shape[1] != 3:
        pixels = pixels.permute(0, 3, 1, 2)
    return Images(pixels.contiguous().float() / 255.0, labels.long())


def fashion_mnist_sample(root: Path | None, train: bool) -> Images:
    """Load the 512 test images that ship with the package."""
    named_root(root)
    with files("ebm_defense.checkpoints").joinpath("fashion_mnist_sample.npz").open("rb") as file:
        sample = np.load(file, allow_pickle=False)
        images = torch.from_numpy(sample["images"]).float()[:, None] / 255.0
        return Images(images, torch.from_numpy(sample["labels"]).long())


def digits(root: Path | None, train: bool) -> Images:
    """Load scikit-learn's handwritten digits, a fixed stratified fifth of them as the test half."""
    named_root(root)
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
    fifth = len(order) // 5
    chosen = order[fifth:] if train else order[:fifth]
    return Images(images[chosen], labels[chosen])
