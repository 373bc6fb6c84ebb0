"""Images and labels as people bring them, made tensors at every public door."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.images import check_images, check_labels

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x")
LABEL_KEYS = ("label", "labels", "target", "targets", "fine_label", "class", "y")


def read_batch(images: Any, labels: Any = None) -> tuple[Tensor, Tensor]:
    """Return images `[N, C, H, W]` in [0, 1] and labels int64 `[N]`, both checked.

    Args:
        images: a tensor, a NumPy array, or a list of images `[C, H, W]`; or, with no labels, a
            data set or a data loader, which is read to its end.
        labels: one whole number an image, of any type, `[N]` or `[N, 1]`; None with a data set.

    Raises:
        UsageError: what has no one reading as such, NaN, or pixels outside [0, 1].
    """
    if labels is None and not isinstance(images, Tensor | np.ndarray):
        images, labels = _read_all(images)
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
            of images `[C, H, W]`.
        name: what to call them.

    Raises:
        UsageError: another shape or dtype, NaN, or pixels outside [0, 1].
    """
    pixels = as_images(images, name).detach()
    check_images(pixels, name=name)
    return _ordinary(pixels)


def as_images(images: Any, name: str = "images") -> Tensor:
    """Return images as a tensor, not checked; a tensor as it is."""
    if isinstance(images, Tensor):
        return images
    if isinstance(images, np.ndarray):
        # NumPy computes in float64 where nobody asked for it; torch's models do not.
        single = images.astype(np.float32) if images.dtype == np.float64 else images
        return torch.tensor(single)
    if isinstance(images, Sequence) and len(images):
        return _stack([as_images(image, name) for image in images], name)
    raise UsageError(f"{name} must be a float tensor [N, C, H, W], not {type(images).__name__}.")


def read_labels(labels: Any) -> Tensor:
    """Return labels as int64 `[N]`.

    Raises:
        UsageError: no whole numbers.
    """
    try:
        found = torch.as_tensor(np.asarray(labels) if isinstance(labels, Sequence) else labels)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"labels must be whole numbers, one an image, not {_glimpse(labels)}."
        ) from None
    found = found.detach()
    if found.is_complex() or (found.is_floating_point() and bool((found != found.round()).any())):
        raise UsageError("labels must be whole numbers, one an image, not probabilities.")
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    return _ordinary(found.long())


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that was not made under inference_mode, which autograd cannot use."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _read_all(data: Any) -> tuple[Tensor, Tensor]:
    """Read a data set's items, or a loader's batches, to their end."""
    parts = [_pair(item) for item in _items(data)]
    if not parts:
        raise UsageError("the data set is empty.")
    images = [_as_batch(as_images(image)) for image, _ in parts]
    labels = [read_labels(label).reshape(-1) for _, label in parts]
    if len({part.shape[1:] for part in images}) > 1:
        raise UsageError("the data set's images differ in size; resize them to one.")
    return torch.cat(images), torch.cat(labels)


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, Iterable):
        yield from data
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        yield from (data[i] for i in range(len(data)))
    else:
        raise UsageError(
            "images must be a float tensor [N, C, H, W], an array, a data set or a data loader, "
            f"not {type(data).__name__}."
        )


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


def _as_batch(image: Tensor) -> Tensor:
    return image[None] if image.ndim == 3 else image


def _stack(images: list[Tensor], name: str) -> Tensor:
    if len({image.shape for image in images}) > 1:
        raise UsageError(f"the {name} differ in size; resize them to one.")
    return torch.stack(images)


def _glimpse(value: Any) -> str:
    return type(value).__name__ if isinstance(value, Mapping | Tensor) else repr(value)[:60]
