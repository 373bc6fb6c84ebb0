"""Data sets come out on one scale, in fixed splits and balanced samples, or say what to do."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ebm_defense import data
from ebm_defense._torchvision import torchvision
from ebm_defense.data import DATASETS, data_roots, dataset, load_data, stratified_order
from ebm_defense.errors import UsageError

quick = settings(deadline=None, max_examples=30, derandomize=True)


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EBM_DEFENSE_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "no-debian")


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
    assert train + val == contents(DATASETS["digits"].load(Path(), True))
    assert test == contents(DATASETS["digits"].load(Path(), False))
    assert not train & val
    assert not train & test
    assert not val & test


def test_validation_split_keeps_the_class_shares():
    whole = DATASETS["digits"].load(Path(), True).labels.bincount().double()
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


# Folders


def write_tree(root: Path, sizes=((6, 5),), classes=("cat", "dog"), each=3) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            height, width = sizes[i % len(sizes)]
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_a_folder_tree_becomes_images_and_labels(tmp_path):
    root = write_tree(tmp_path / "tree")
    found = load_data("folder", root=root)
    assert_images(found, (6, 3, 6, 5), 2)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = np.asarray(Image.open(root / "cat" / "0.png")) / 255
    torch.testing.assert_close(found.images[0], torch.tensor(first).float().permute(2, 0, 1))


def test_a_folder_can_be_sampled(tmp_path):
    found = load_data("folder", root=write_tree(tmp_path / "tree"), limit=4)
    assert found.labels.bincount().tolist() == [2, 2]


def test_a_folder_has_a_test_split_alone(tmp_path):
    with pytest.raises(UsageError, match="no split 'train'"):
        load_data("folder", "train", root=write_tree(tmp_path / "tree"))


def test_a_folder_of_images_of_several_sizes_is_refused(tmp_path):
    root = write_tree(tmp_path / "tree", sizes=((6, 5), (5, 6)))
    with pytest.raises(UsageError, match="differ in size"):
        load_data("folder", root=root)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "tree" / "cat").mkdir(parents=True)
    for root in (tmp_path / "tree", tmp_path / "tree" / "cat"):
        with pytest.raises(UsageError, match="no folder of class folders"):
            load_data("folder", root=root)


def test_a_folder_needs_a_root():
    with pytest.raises(UsageError, match="needs a data root"):
        load_data("folder")


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
    with pytest.raises(UsageError, match=r"'mnist'.*cifar10.*digits"):
        load_data("mnist")


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
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    return write_debian(tmp_path / "debian")


def test_debians_files_are_unpacked_into_the_cache(debian, tmp_path):
    found = load_data("fashion-mnist")
    expected = torch.from_numpy(debian["t10k-images-idx3-ubyte"])[:, None] / 255
    torch.testing.assert_close(found.images, expected.float())
    assert found.labels.tolist() == debian["t10k-labels-idx1-ubyte"].tolist()
    raw = tmp_path / "cache" / "ebm-defense" / "FashionMNIST" / "raw"
    assert sorted(p.name for p in raw.iterdir()) == sorted(debian)


def test_debians_training_images_are_split(debian):
    train, val = load_data("fashion-mnist", "train"), load_data("fashion-mnist", "val")
    assert (len(train.labels), len(val.labels)) == (33, 3)
    assert val.labels.sort().values.tolist() == [0, 1, 2]


def test_unpacked_files_are_used_without_unpacking_again(debian, monkeypatch, tmp_path):
    first = load_data("fashion-mnist")
    monkeypatch.setattr(gzip, "open", lambda *_: pytest.fail("unpacked twice"))
    for root in (None, tmp_path):
        assert torch.equal(load_data("fashion-mnist", root=root).images, first.images)
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "uninstalled")
    assert torch.equal(load_data("fashion-mnist").images, first.images)


def test_files_in_the_named_root_come_before_debians(debian, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "other")
    other = write_debian(tmp_path / "other", seed=1)
    raw = tmp_path / "mine" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, array in debian.items():
        (raw / name).write_bytes(idx(array))
    found = load_data("fashion-mnist", root=tmp_path / "mine").images * 255
    assert np.array_equal(found[:, 0].round(), debian["t10k-images-idx3-ubyte"])
    assert not np.array_equal(found[:, 0].round(), other["t10k-images-idx3-ubyte"])


def test_a_damaged_archive_leaves_no_file_that_looks_whole(debian, tmp_path):
    packed = tmp_path / "debian" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises((EOFError, OSError, UsageError)):
        load_data("fashion-mnist")
    raw = tmp_path / "cache" / "ebm-defense" / "FashionMNIST" / "raw"
    assert not (raw / "train-images-idx3-ubyte").exists()


def test_unpacking_that_was_interrupted_goes_on_the_next_time(debian, tmp_path):
    packed = tmp_path / "debian" / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-200])
    with pytest.raises((EOFError, OSError, UsageError)):
        load_data("fashion-mnist")
    packed.write_bytes(whole)
    assert len(load_data("fashion-mnist").labels) == 9


def test_every_listed_data_set_names_its_ten_classes_or_none():
    for name, entry in DATASETS.items():
        assert len(entry.classes) in (0, 10), name
        assert set(entry.splits) <= set(data.SPLITS)
    assert not DATASETS["svhn"].flip
    assert not DATASETS["digits"].flip
