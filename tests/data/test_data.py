"""Data sets come out on one scale, in fixed splits and balanced samples, or say what to do."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ebm_defense._torchvision import torchvision
from ebm_defense.data import (
    DATASETS,
    SPLITS,
    FolderSettings,
    Framing,
    data_roots,
    dataset,
    load_data,
    open_data,
    published,
    stratified_order,
)
from ebm_defense.errors import UsageError

quick = settings(deadline=None, max_examples=30, derandomize=True)


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EBM_DEFENSE_DATA", raising=False)
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "no-debian")


def assert_images(found, shape, classes):
    assert found.images.shape == shape
    assert found.images.dtype == torch.float32
    assert float(found.images.min()) >= 0
    assert 0.5 < float(found.images.max()) <= 1
    assert found.labels.shape == shape[:1]
    assert found.labels.dtype == torch.int64
    assert set(found.labels.tolist()) == set(range(classes))


def contents(found) -> Counter:
    return Counter(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(found.images, found.labels, strict=True)
    )


def deviation(labels: torch.Tensor) -> float:
    """The largest distance, over all prefixes and classes, of a count from its share."""
    _, index = labels.unique(return_inverse=True)
    counts = torch.nn.functional.one_hot(index).double().cumsum(0)
    lengths = torch.arange(1, len(labels) + 1)[:, None]
    return float((counts - lengths * counts[-1] / len(labels)).abs().max())


# What ships


def test_the_shipped_sample_holds_512_images_of_ten_classes():
    found = load_data("fashion-mnist-sample")
    assert_images(found, (512, 1, 28, 28), 10)
    counts = found.labels.bincount()
    assert counts.max() - counts.min() <= 1
    assert len(dataset("fashion-mnist-sample").classes) == 10


def test_the_shipped_sample_is_on_the_8_bit_scale():
    pixels = load_data("fashion-mnist-sample", limit=20).images * 255
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)
    assert float(pixels.max()) > 200


def test_the_shipped_sample_has_a_test_split_alone():
    with pytest.raises(UsageError, match="no split 'train'"):
        load_data("fashion-mnist-sample", "train")


def test_digits_are_8_by_8_in_three_splits():
    sizes = {}
    for split in ("train", "val", "test"):
        found = load_data("digits", split)
        sizes[split] = len(found.labels)
        assert_images(found, (sizes[split], 1, 8, 8), 10)
    assert sum(sizes.values()) == 1797
    assert sizes["val"] == round((1797 - sizes["test"]) / 12)


def test_digits_splits_are_disjoint_and_leave_nothing_out():
    train, val, test = (contents(load_data("digits", s)) for s in ("train", "val", "test"))
    assert train + val == contents(published.digits(None, True))
    assert test == contents(published.digits(None, False))
    assert not train & val
    assert not train & test
    assert not val & test


def test_validation_split_keeps_the_class_shares():
    whole = published.digits(None, True).labels.bincount().double()
    val = load_data("digits", "val").labels.bincount().double()
    assert float((val - whole * val.sum() / whole.sum()).abs().max()) < 2


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_loading_twice_gives_the_same_images(split):
    for a, b in zip(load_data("digits", split), load_data("digits", split), strict=True):
        assert torch.equal(a, b)


# Samples


def test_a_sample_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(0)
    first, state = load_data("digits", limit=50, seed=3), torch.get_rng_state()
    torch.manual_seed(1)
    second, other = load_data("digits", limit=50, seed=3), load_data("digits", limit=50, seed=4)
    assert torch.equal(first.images, second.images)
    assert not torch.equal(first.images, other.images)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_smaller_sample_is_a_prefix_of_a_larger():
    small, large = (load_data("fashion-mnist-sample", limit=n) for n in (30, 70))
    assert torch.equal(small.images, large.images[:30])
    assert torch.equal(small.labels, large.labels[:30])


def test_images_keep_their_labels_in_a_sample():
    whole, sample = load_data("digits"), load_data("digits", limit=100)
    assert not contents(sample) - contents(whole)


@pytest.mark.parametrize("limit", [10, 64, 511, 512])
def test_a_sample_of_the_shipped_images_is_balanced(limit):
    whole = load_data("fashion-mnist-sample").labels.bincount()
    counts = load_data("fashion-mnist-sample", limit=limit).labels.bincount(minlength=10)
    assert counts.sum() == limit
    assert float((counts - limit * whole / 512).abs().max()) <= 1


@quick
@given(classes=st.integers(1, 12), each=st.integers(1, 20), seed=st.integers(0, 1000))
def test_every_prefix_is_balanced_to_within_one_for_classes_of_one_size(classes, each, seed):
    labels = torch.arange(classes).repeat(each)
    order = stratified_order(labels, seed)
    assert order.sort().values.tolist() == list(range(len(labels)))
    counts = torch.nn.functional.one_hot(labels[order], classes).cumsum(0)
    assert int((counts.max(1).values - counts.min(1).values).max()) <= 1


@quick
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=10), seed=st.integers(0, 1000))
def test_every_prefix_stays_near_the_shares_for_classes_of_any_size(sizes, seed):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    # Each class is within one of its share of the quantile reached, and their errors add up.
    assert deviation(labels[stratified_order(labels, seed)]) <= 1 + len(sizes)


@pytest.mark.parametrize("seed", range(3))
def test_every_prefix_of_the_digits_keeps_the_shares_to_within_two(seed):
    found = load_data("digits", "train")
    assert deviation(found.labels[stratified_order(found.labels, seed)]) <= 2


def test_order_is_another_for_another_seed():
    labels = torch.arange(4).repeat(10)
    orders = [stratified_order(labels, seed).tolist() for seed in range(5)]
    assert len({tuple(o) for o in orders}) == 5


def test_labels_need_not_run_from_zero():
    labels = torch.tensor([7, 7, 900, 900])
    assert labels[stratified_order(labels, 0)][:2].sort().values.tolist() == [7, 900]


# Roots and refusals


def test_data_are_looked_for_in_root_environment_and_cache(monkeypatch, tmp_path):
    assert data_roots() == [tmp_path / "cache" / "ebm-defense"]
    monkeypatch.setenv("EBM_DEFENSE_DATA", str(tmp_path / "named"))
    assert data_roots(tmp_path) == [
        tmp_path, tmp_path / "named", tmp_path / "cache" / "ebm-defense",
    ]  # fmt: skip
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_roots("~/d")[0] == tmp_path / "d"
    assert data_roots()[-1] == tmp_path / ".cache" / "ebm-defense"


def test_unknown_data_sets_are_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'imagenet'.*mnist.*cifar10.*digits"):
        load_data("imagenet")


def test_unknown_splits_are_answered_with_the_known_ones():
    with pytest.raises(UsageError, match=r"'dev'.*train, val, test"):
        load_data("digits", "dev")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_sample_of_nothing_is_refused(limit):
    with pytest.raises(UsageError, match="at least 1"):
        load_data("digits", limit=limit)


def test_more_images_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"513 images.*only 512"):
        load_data("fashion-mnist-sample", limit=513)


@pytest.mark.parametrize("name", ["digits", "cifar10", "folder", "fashion-mnist"])
def test_a_root_that_does_not_exist_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_data(name, root=tmp_path / "nowhere")


# torchvision's data sets


class Absent:
    """A torchvision data set that is neither here nor downloadable."""

    calls: list[tuple[str, bool]] = []  # noqa: RUF012
    offline: Exception = OSError("no network")

    def __init__(self, root, *, download, **half):
        self.calls.append((root, download))
        raise self.offline if download else RuntimeError("Dataset not found or corrupted.")


@pytest.mark.parametrize("failure", [OSError("no network"), RuntimeError("Error downloading")])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("cifar10", "CIFAR10"),
        ("cifar100", "CIFAR100"),
        ("svhn", "SVHN"),
        ("fashion-mnist", "FashionMNIST"),
    ],
)
def test_absent_data_say_what_to_do(monkeypatch, tmp_path, name, cls, failure):
    monkeypatch.setattr(torchvision("datasets"), cls, Absent)
    monkeypatch.setattr(Absent, "offline", failure)
    with pytest.raises(UsageError, match=f"{cls} is neither in .* nor downloadable") as error:
        load_data(name, root=tmp_path)
    assert str(failure) in str(error.value)
    assert "--data-root" in str(error.value)
    assert ("dataset-fashion-mnist" in str(error.value)) == (name == "fashion-mnist")


def test_every_root_is_tried_before_a_download_into_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision("datasets"), "CIFAR10", Absent)
    monkeypatch.setattr(Absent, "calls", [])
    monkeypatch.setenv("EBM_DEFENSE_DATA", str(tmp_path / "named"))
    with pytest.raises(UsageError):
        load_data("cifar10", root=tmp_path)
    looked = [Path(root) for root, download in Absent.calls if not download]
    assert list(dict.fromkeys(looked)) == data_roots(tmp_path)
    assert Absent.calls[-1] == (str(tmp_path), True)


def fake(monkeypatch, cls, pixels, **labels):
    """Put a data set of these pixels in the place of torchvision's, and return its arguments."""
    seen: list[dict] = []

    class Fake:
        def __init__(self, root, **options):
            seen.append(options)
            self.data = pixels
            self.__dict__.update(labels)

    monkeypatch.setattr(torchvision("datasets"), cls, Fake)
    return seen


@pytest.mark.parametrize(
    ("name", "cls", "layout", "key"),
    [
        ("cifar10", "CIFAR10", (0, 2, 3, 1), "targets"),
        ("cifar100", "CIFAR100", (0, 2, 3, 1), "targets"),
        ("svhn", "SVHN", (0, 1, 2, 3), "labels"),
    ],
)
def test_colour_images_come_out_channels_first(monkeypatch, name, cls, layout, key):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    labels = list(range(10)) * 2
    seen = fake(monkeypatch, cls, pixels.transpose(layout), **{key: labels})
    found = load_data(name)
    torch.testing.assert_close(found.images, torch.from_numpy(pixels).float() / 255)
    assert found.labels.tolist() == labels
    half = {"split": "test"} if name == "svhn" else {"train": False}
    assert seen == [{"download": False} | half]


def test_training_images_are_split_for_validation(monkeypatch):
    pixels = np.arange(120, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    fake(monkeypatch, "CIFAR10", pixels, targets=list(range(10)) * 12)
    train, val = load_data("cifar10", "train"), load_data("cifar10", "val")
    assert val.labels.bincount().tolist() == [1] * 10
    assert train.labels.bincount().tolist() == [11] * 10
    assert not contents(train) & contents(val)


# Debian's Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_debian(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (36, 28, 28)),
        "train-labels-idx1-ubyte": np.arange(36) % 3,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (9, 28, 28)),
        "t10k-labels-idx1-ubyte": np.arange(9) % 3,
    }
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return arrays


@pytest.fixture
def debian(monkeypatch, tmp_path):
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return write_debian(tmp_path / "debian")


def test_debians_files_are_read_as_they_lie(debian, tmp_path):
    found = load_data("fashion-mnist")
    expected = torch.from_numpy(debian["t10k-images-idx3-ubyte"])[:, None] / 255
    torch.testing.assert_close(found.images, expected.float())
    assert found.labels.tolist() == debian["t10k-labels-idx1-ubyte"].tolist()
    assert not (tmp_path / "cache").exists()


def test_debians_training_images_are_split(debian):
    train, val = load_data("fashion-mnist", "train"), load_data("fashion-mnist", "val")
    assert (len(train.labels), len(val.labels)) == (33, 3)
    assert val.labels.sort().values.tolist() == [0, 1, 2]


def test_files_in_the_named_root_come_before_debians(debian, monkeypatch, tmp_path):
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "other")
    other = write_debian(tmp_path / "other", seed=1)
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in debian.items():
        (raw / name).write_bytes(idx(array))
    found = load_data("fashion-mnist", root=tmp_path / "mine").images * 255
    assert np.array_equal(found[:, 0].round(), debian["t10k-images-idx3-ubyte"])
    assert not np.array_equal(found[:, 0].round(), other["t10k-images-idx3-ubyte"])


# Damage in a named place


def write_idx(folder: Path, name: str = "FashionMNIST/raw", packed: bool = False) -> Path:
    """Write five test and five training images, each of one grey, and return their folder."""
    raw = folder / name
    raw.mkdir(parents=True, exist_ok=True)
    for half in ("train", "t10k"):
        pixels = np.full((5, 28, 28), 51)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(5))):
            content = idx(array)
            file = raw / f"{half}-{kind}-ubyte{'.gz' * packed}"
            file.write_bytes(gzip.compress(content) if packed else content)
    return raw


def spoil(how: str, file: Path) -> None:
    content = file.read_bytes()
    spoilt = {
        "one byte short": content[:-1],
        "one byte long": content + b"0",
        "half a header": content[:6],
        "empty": b"",
        "a web page": b"<html>404</html>" + content,
    }
    file.write_bytes(spoilt[how])


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Put whole data of the same name into the places that are searched after a named one."""
    monkeypatch.setattr(published, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    write_debian(tmp_path / "debian")
    for cls in ("MNIST", "FashionMNIST"):
        write_idx(tmp_path / "cache" / "ebm-defense", f"{cls}/raw")


@pytest.mark.parametrize(
    "how", ["one byte short", "one byte long", "half a header", "empty", "a web page"]
)
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_damage_in_a_named_place_is_told_and_nothing_else_is_loaded(
    elsewhere, tmp_path, name, kind, how
):
    cls = {"mnist": "MNIST"}.get(name, "FashionMNIST")
    file = write_idx(tmp_path / "mine", f"{cls}/raw") / f"t10k-{kind}-ubyte"
    assert len(load_data(name, root=tmp_path / "mine").labels) == 5
    spoil(how, file)
    with pytest.raises(UsageError, match=f"{file} is damaged"):
        load_data(name, root=tmp_path / "mine")


@pytest.mark.parametrize("place", ["environment", "cache", "debian"])
def test_damage_anywhere_on_the_way_is_told(elsewhere, monkeypatch, tmp_path, place):
    folder = {"cache": tmp_path / "cache" / "ebm-defense"}.get(place, tmp_path / "mine")
    raw = tmp_path / "debian" if place == "debian" else write_idx(folder)
    if place == "debian":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-cache"))
    if place == "environment":
        monkeypatch.setenv("EBM_DEFENSE_DATA", str(tmp_path / "mine"))
    file = next(raw.glob("t10k-images-idx3-ubyte*"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match=f"{file} is damaged"):
        load_data("fashion-mnist")


def test_a_file_without_its_other_half_is_told(elsewhere, tmp_path):
    raw = write_idx(tmp_path / "mine")
    (raw / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UsageError, match="without its labels"):
        load_data("fashion-mnist", root=tmp_path / "mine")


def test_labels_and_images_of_unlike_count_are_told(elsewhere, tmp_path):
    raw = write_idx(tmp_path / "mine")
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(4)))
    with pytest.raises(UsageError, match=r"5 images, but .* 4 labels"):
        load_data("fashion-mnist", root=tmp_path / "mine")


def test_what_is_absent_is_looked_for_further(elsewhere, tmp_path):
    (tmp_path / "mine").mkdir()
    assert len(load_data("fashion-mnist", root=tmp_path / "mine").labels) == 5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["MNIST/raw", "."])
def test_mnist_is_read_where_people_have_it(tmp_path, folder, packed):
    write_idx(tmp_path / "mine", folder, packed)
    found = load_data("mnist", root=tmp_path / "mine")
    torch.testing.assert_close(found.images, torch.full((5, 1, 28, 28), 0.2))
    assert found.labels.tolist() == list(range(5))
    assert dataset("mnist").classes[7] == "7"
    assert not dataset("mnist").flip


def write_cifar(monkeypatch, root: Path) -> Path:
    """Write a small CIFAR-10 whose MD5s torchvision expects."""
    datasets = torchvision("datasets")
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    files: dict[str, dict] = {"batches.meta": {"label_names": list("abcdefghij")}}
    for name in [n for n, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]:
        files[name] = {"data": np.full((10, 3072), 51, np.uint8), "labels": list(range(10))}
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        names = [n for n, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[n, sums[n]] for n in names])
    meta = {**datasets.CIFAR10.meta, "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return folder


@pytest.mark.parametrize("name", ["test_batch", "data_batch_3", "batches.meta"])
@pytest.mark.parametrize("how", ["one byte short", "gone"])
def test_damaged_colour_images_in_a_named_place_are_told(monkeypatch, tmp_path, name, how):
    folder = write_cifar(monkeypatch, tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "cache" / "ebm-defense")
    assert len(load_data("cifar10", root=tmp_path / "mine").labels) == 10
    spoil(how, folder / name) if how != "gone" else (folder / name).unlink()
    said = "is missing" if how == "gone" else "is damaged"
    with pytest.raises(UsageError, match=f"{folder / name} {said}"):
        load_data("cifar10", root=tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / folder.name)
    assert len(load_data("cifar10", root=tmp_path / "mine").labels) == 10


def test_settings_of_photos_are_for_folders_alone():
    with pytest.raises(UsageError, match="only data set 'folder'"):
        load_data("digits", folder=FolderSettings(framing=Framing(crop=8)))


def test_an_opened_data_set_knows_its_classes():
    source = open_data("digits")
    assert source.classes == dataset("digits").classes
    assert torch.equal(source.labels, load_data("digits").labels)


def test_every_listed_data_set_names_its_ten_classes_or_none():
    for name, entry in DATASETS.items():
        assert len(entry.classes) in (0, 10), name
        assert set(entry.splits) <= set(SPLITS)
    assert not DATASETS["svhn"].flip
    assert not DATASETS["digits"].flip
