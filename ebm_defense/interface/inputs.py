"""Images and labels as people bring them, made tensors at every public door."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.interface.images import check_images, check_labels
from ebm_defense.interface.modes import own_dtype

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label", "class", "y")


def read_batch(images: Any, labels: Any = None) -> tuple[Tensor, Tensor]:
    """Return images `[N, C, H, W]` in [0, 1] and labels int64 `[N]`, both checked.

    Args:
        images: a tensor, a NumPy array, or a list of images `[C, H, W]`; or, with no labels, a pair
            of both, a data set or a data loader, which is read to its end.
        labels: one whole number an image, of any type, `[N]` or `[N, 1]`, or one-hot
            `[N, classes]`; None with a data set.

    Raises:
        UsageError: what has no one reading as such, NaN, or pixels outside [0, 1].
    """
    if labels is None and not isinstance(images, Tensor | np.ndarray):
        images, labels = images if _is_batch(images) else _read_all(images)
    if labels is None:
        raise UsageError("labels are missing: give one whole number an image, or a data set.")
    pixels = read_images(images)
    classes = read_labels(labels)
    check_labels(classes, pixels)
    return pixels, classes.to(pixels.device)


def read_images(images: Any, *, name: str = "images") -> Tensor:
    """Return images `[N, C, H, W]` in [0, 1], checked, that carry no gradient.

    Args:
        images: a tensor, a NumPy array (of float64 too, as NumPy makes them: float32), or a list
            of images `[C, H, W]`, Pillow's too.
        name: what to call them.

    Raises:
        UsageError: another shape or dtype, NaN, or pixels outside [0, 1].
    """
    pixels = as_images(images, name).detach()
    check_images(pixels, name=name)
    return _ordinary(pixels)


def read_training_images(images: Any, network: nn.Module | None = None) -> Tensor:
    """Return images to learn from, as `read_images`, in the dtype of the network that learns.

    Args:
        images: as `read_images` takes them, or a data set or a data loader with or without labels.
        network: what learns; float32 where none is given, or its weights have several dtypes.

    Raises:
        UsageError: as `read_images`, or there are none.
    """
    if not isinstance(images, Tensor | np.ndarray | Sequence):
        images, _ = _read_all(images)
    pixels = read_images(images, name="training images")
    if not len(pixels):
        raise UsageError("there are no training images.")
    return pixels.to((network and own_dtype(network)) or torch.float32)


def read_training_data(
    images: Any, labels: Any = None, network: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Return images and labels to learn from, as `read_batch` and `read_training_images`."""
    if labels is None:
        images, labels = read_batch(images)
    pixels = read_training_images(images, network)
    classes = read_labels(labels)
    check_labels(classes, pixels)
    return pixels, classes.to(pixels.device)


def as_images(images: Any, name: str = "images") -> Tensor:
    """Return images as a tensor, not checked; a tensor as it is, if it is no sparse one."""
    if isinstance(images, Tensor):
        return images.to_dense() if images.layout != torch.strided else images
    if isinstance(images, np.ndarray):
        return _from_numpy(images, name)
    if isinstance(images, Image.Image):
        return _from_pillow(images)
    if isinstance(images, Sequence) and len(images) and not isinstance(images, str | bytes):
        if isinstance(images[0], int | float):
            raise UsageError(
                f"{name} must be a float tensor [N, C, H, W] or an array, not nested lists."
            )
        return _stack([as_images(image, name) for image in images], name)
    raise UsageError(f"{name} must be a float tensor [N, C, H, W], not {_glimpse(images)}.")


def _from_numpy(array: np.ndarray[Any, Any], name: str) -> Tensor:
    """Return an array of any layout and byte order as a tensor of its own."""
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{name} must be numbers, not an array of {array.dtype}.")
    # NumPy computes in float64 where nobody asked for it; torch's models do not.
    kind = np.dtype(np.float32) if array.dtype.itemsize == 8 and array.dtype.kind == "f" else None
    return torch.from_numpy(np.array(array, dtype=kind or array.dtype.newbyteorder("="), order="C"))


def _from_pillow(image: Image.Image) -> Tensor:
    """Return a Pillow image of 8 bits a channel as `[C, H, W]` in [0, 1]."""
    if image.mode not in ("L", "RGB"):
        raise UsageError(
            f"Pillow images must be of mode L or RGB, not {image.mode}; convert them first, or "
            'read their files with load_data("folder", …).'
        )
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def read_labels(labels: Any) -> Tensor:
    """Return labels as int64 `[N]`, and one-hot ones `[N, classes]` as the classes they name.

    Raises:
        UsageError: no whole numbers.
    """
    try:
        found = _numbers(labels)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"labels must be whole numbers, one an image, not {_glimpse(labels)}."
        ) from None
    found = found.detach()
    if found.is_complex() or (found.is_floating_point() and not _whole(found)):
        raise UsageError("labels must be whole numbers, one an image, not probabilities.")
    if found.ndim > 1 and all(size == 1 for size in found.shape[1:]):
        found = found.flatten()
    if found.ndim == 2 and bool((((found == 0) | (found == 1)).all(1) & (found.sum(1) == 1)).all()):
        found = found.argmax(1)
    return _ordinary(found.long().reshape(found.shape or (1,)))


def _numbers(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    if isinstance(labels, Iterator):
        labels = list(labels)
    found = np.asarray(labels)
    if found.dtype == object:
        found = np.array([operator.index(label) for label in found.flat]).reshape(found.shape)
    return torch.from_numpy(found.astype(np.float64 if found.dtype.kind == "f" else np.int64))


def _whole(numbers: Tensor) -> bool:
    return bool(numbers.isfinite().all()) and bool((numbers == numbers.round()).all())


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that was not made under inference_mode, which autograd cannot use."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _is_batch(data: Any) -> bool:
    """Whether this is a pair of images and their labels, as a loader gives one."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        return False
    return isinstance(data[0], Tensor | np.ndarray) and data[0].ndim == 4


def _read_all(data: Any) -> tuple[Tensor, Tensor]:
    """Read a data set's items, or a loader's batches, to their end."""
    # A loader draws from torch's generator, even where it shuffles nothing.
    with torch.random.fork_rng([]):
        parts = [_item(*_pair(item)) for item in _items(data)]
    if not parts:
        raise UsageError("the data set is empty.")
    if len({images.shape[1:] for images, _ in parts}) > 1:
        raise UsageError("the data set's images differ in size; resize them to one.")
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _items(data: Any) -> Iterator[Any]:
    number = 0
    try:
        for item in _iterated(data):
            yield item
            number += 1
    except UsageError:
        raise
    except Exception as error:  # a data set is anybody's code
        raise UsageError(
            f"the data set failed after {number} items: {type(error).__name__}: {error}."
        ) from error


def _iterated(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping):
        return [data]
    known = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if not known or isinstance(data, str | bytes | PurePath):
        raise UsageError(
            "images must be a float tensor [N, C, H, W], an array, a data set or a data loader, "
            f"not {_glimpse(data)}; load_data reads those that have a name."
        )
    # A data set of a length need not end by an IndexError.
    counted = hasattr(data, "__len__") and not isinstance(data, Iterable)
    return (data[i] for i in range(len(data))) if counted else iter(data)


def _item(image: Any, label: Any) -> tuple[Tensor, Tensor]:
    """Return one image and its label, or a batch of both, as a batch of its own memory.

    A generator may write its next item over this one.
    """
    pixels = as_images(image).clone()
    if pixels.ndim == 4:
        return pixels, read_labels(label).clone()
    if pixels.ndim != 3:
        check_images(pixels[None], name="a data set's images")
    one = read_labels(label).clone()
    return pixels[None], read_labels(one[None]) if len(one) > 1 else one


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image, label = _only(item, IMAGE_KEYS, "image"), _only(item, LABEL_KEYS, "label")
        return item[image], item[label]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise UsageError(
        f"a data set must give pairs of an image and its label, not {_glimpse(item)}; "
        "without a data set, give images and labels."
    )


def _only(item: Mapping[str, Any], names: tuple[str, ...], what: str) -> str:
    found = [name for name in item if str(name).lower() in names]
    if len(found) != 1:
        raise UsageError(
            f"a data set's items hold {', '.join(map(str, item))}, of which {len(found) or 'no'} "
            f"can be the {what}; give pairs of an image and its label."
        )
    return found[0]


def _stack(images: list[Tensor], name: str) -> Tensor:
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"the {name} differ in size; resize them to one.")
    return torch.stack(images)


def _glimpse(value: Any) -> str:
    """Return what an error shows of a value: small ones as they are, others by their kind."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(map(_glimpse, value[:4]))}"[:100]
    small = value is None or isinstance(value, int | float | str | bytes)
    return repr(value)[:60] if small else type(value).__name__
