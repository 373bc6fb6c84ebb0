"""Images and labels as people bring them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ebm_defense import UsageError
from ebm_defense.data import Images
from ebm_defense.interface.inputs import read_batch, read_images, read_labels

IMAGES = torch.rand((4, 3, 5, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2])
ARRAY = IMAGES.numpy()

IMAGES_AS = {
    "reversed": lambda: ARRAY[:, :, ::-1].copy()[:, :, ::-1],
    "big-endian": lambda: ARRAY.astype(">f4"),
    "read-only": lambda: np.broadcast_to(ARRAY, ARRAY.shape),
    "column-major": lambda: np.asfortranarray(ARRAY),
    "float64": lambda: ARRAY.astype(np.float64),
    "sparse": IMAGES.to_sparse,
    "a tuple": lambda: tuple(IMAGES),
    "a parameter": lambda: torch.nn.Parameter(IMAGES),
    "strided": lambda: IMAGES.repeat_interleave(2, 0)[::2],
}


@pytest.mark.parametrize("brought", IMAGES_AS)
def test_images_of_any_layout(brought):
    found = read_images(IMAGES_AS[brought]())
    assert torch.equal(found, IMAGES)
    assert not found.requires_grad


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pillow_s_images_are_divided_by_255(mode):
    pictures = [
        Image.fromarray((255 * x.permute(1, 2, 0).numpy()).astype(np.uint8)) for x in IMAGES
    ]
    found = read_images([picture.convert(mode) for picture in pictures])
    expected = np.stack([np.asarray(picture.convert(mode)) for picture in pictures]) / 255
    planes = found.permute(0, 2, 3, 1).squeeze(-1)
    np.testing.assert_allclose(planes.numpy(), expected, atol=1e-6)


LABELS_AS = {
    "one-hot": lambda: F.one_hot(LABELS),
    "one-hot floats": lambda: F.one_hot(LABELS).double(),
    "columns": lambda: LABELS[:, None, None],
    "objects": lambda: np.array(LABELS.tolist(), dtype=object),
    "an iterator": lambda: iter(LABELS.tolist()),
    "uint64": lambda: LABELS.numpy().astype(np.uint64),
    "uint16 of torch": lambda: LABELS.to(torch.uint16),
    "big-endian": lambda: LABELS.numpy().astype(">i4"),
    "tensors": lambda: list(LABELS),
    "a tuple": lambda: tuple(LABELS.tolist()),
}


@pytest.mark.parametrize("brought", LABELS_AS)
def test_labels_of_any_kind(brought):
    found = read_labels(LABELS_AS[brought]())
    assert found.dtype == torch.int64
    assert torch.equal(found, LABELS)


@pytest.mark.parametrize("label", [2, np.int8(2), torch.tensor(2), [2], torch.tensor([[2.0]])])
def test_one_label_of_one_image(label):
    images, labels = read_batch(IMAGES[:1], label)
    assert torch.equal(images, IMAGES[:1])
    assert labels.tolist() == [2]


NO_LABELS = {
    "fractions": [0.5, 1.0, 2.0, 0.0],
    "not a number": [float("nan")] * 4,
    "infinite": [float("inf")] * 4,
    "words": ["cat"] * 4,
    "several classes": torch.ones((4, 3)),
    "another axis": LABELS[None],
    "a set": {0, 1, 2},
    "complex": torch.ones(4) + 1j,
    "negative": LABELS - 1,
    "none": None,
}


@pytest.mark.parametrize("labels", NO_LABELS.values(), ids=NO_LABELS)
def test_no_labels_are_refused_in_a_sentence(labels):
    with pytest.raises(UsageError, match="labels") as refused:
        read_batch(IMAGES, labels)
    assert "\n" not in str(refused.value)


class ByNumber:
    """A data set that is indexed, and may neither end by itself nor have a length."""

    def __init__(self, item, ends=True):
        self.item, self.ends = item, ends

    def __getitem__(self, i):
        if self.ends and i >= len(IMAGES):
            raise IndexError
        return self.item(i % len(IMAGES))


class Counted(ByNumber):
    def __len__(self):
        return len(IMAGES)


def written_over():
    image, label = torch.empty_like(IMAGES[0]), torch.zeros((), dtype=torch.int64)
    for x, y in zip(IMAGES, LABELS, strict=True):
        yield image.copy_(x), label.copy_(y)


DATA_AS = {
    "written over": written_over,
    "a pair": lambda: (IMAGES, LABELS),
    "a batch": lambda: [IMAGES, LABELS],
    "Images": lambda: Images(IMAGES, LABELS),
    "a mapping of a batch": lambda: {"image": IMAGES, "label": LABELS},
    "indexed": lambda: ByNumber(lambda i: (IMAGES[i], LABELS[i])),
    "endless": lambda: Counted(lambda i: (ARRAY[i], int(LABELS[i])), ends=False),
    "one-hot": lambda: Counted(lambda i: (IMAGES[i], F.one_hot(LABELS, 3)[i])),
    "batches": lambda: iter([(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])]),
}


@pytest.mark.parametrize("brought", DATA_AS)
def test_data_of_any_container(brought):
    images, labels = read_batch(DATA_AS[brought]())
    assert torch.equal(images, IMAGES)
    assert torch.equal(labels, LABELS)


def broken(i):
    raise OSError("disk")


NO_DATA = {
    "a name": ("cifar10", "load_data"),
    "a broken one": (Counted(broken), "failed after 0 items: OSError: disk"),
    "flat images": (Counted(lambda i: (IMAGES[i, 0], 0)), "a data set's images"),
    "three parts": (Counted(lambda i: (IMAGES[i], 0, 0)), "pairs of an image and its label"),
    "sizes": (Counted(lambda i: (IMAGES[i, :, : i + 1], 0)), "differ in size"),
    "nothing": ([], "empty"),
    "a number": (7, "not 7"),
    "lists": ([[[[0.5]]]], "pairs of an image and its label"),
}


@pytest.mark.parametrize(("data", "said"), NO_DATA.values(), ids=NO_DATA)
def test_no_data_are_refused_in_a_sentence(data, said):
    with pytest.raises(UsageError, match=said) as refused:
        read_batch(data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "images", ["cat", b"cat", [[[[0.5]]]], np.array(["cat"]), Image.new("P", (2, 2)), None]
)
def test_no_images_are_refused_in_a_sentence(images):
    with pytest.raises(UsageError) as refused:
        read_images(images)
    assert "\n" not in str(refused.value)
