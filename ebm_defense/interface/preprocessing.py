"""What a pretrained classifier wants of a photo, read off what came with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ebm_defense.classifiers import normalized
from ebm_defense.data.photos import INTERPOLATIONS, Framing
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of interpolations, by which transformers calls them."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a classifier's photos are framed and scaled.

    Attributes:
        mean, std: of the normalisation, one a channel, in [0, 1] units.
        size: height and width of its images.
        resize: pixels of a photo's shorter side before its centre is cut out.
        interpolation: a name in `INTERPOLATIONS`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: int
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        plain_numbers(self)

    @property
    def framing(self) -> Framing:
        """How photos are read for it, by `read_photo` or `load_data("folder", …)`."""
        return Framing(
            resize=self.resize,
            crop=self.size,
            channels=len(self.mean),
            interpolation=self.interpolation,
        )

    def wrap(self, classifier: nn.Module) -> nn.Module:
        """Return the classifier on images in [0, 1]."""
        return normalized(classifier, self.mean, self.std)


def preprocessing_of(source: Any) -> Preprocessing:
    """Read what a classifier wants off what came with it.

    Args:
        source: a timm model or its `pretrained_cfg`; torchvision's weights
            (`ResNet50_Weights.DEFAULT`) or their `transforms()`; a transformers image processor, or
            a model of it, whose processor is then loaded; or a `Preprocessing`.

    Raises:
        UsageError: nothing of that kind, or images that are not square.
    """
    if isinstance(source, Preprocessing):
        return source
    for known in (source, getattr(source, "pretrained_cfg", None), _transforms(source)):
        for read in (_timm, _torchvision, _transformers):
            if (found := read(known)) is not None:
                return found
    if (processor := _processor(source)) is not None:
        return preprocessing_of(processor)
    raise UsageError(
        f"nothing says what images {type(source).__name__} wants; give preprocessing=, which takes "
        "torchvision's weights, a transformers processor, a timm pretrained_cfg or a Preprocessing."
    )


def _transforms(source: Any) -> Any:
    """Return what torchvision's weights do to a photo."""
    return source.transforms() if callable(getattr(source, "transforms", None)) else None


def _timm(source: Any) -> Preprocessing | None:
    plain = source if isinstance(source, Mapping) else getattr(source, "__dict__", {})
    if not {"input_size", "mean", "std"} <= set(plain):
        return None
    size = _square(plain["input_size"][1:])
    # timm's own default where a model says nothing.
    share = plain.get("crop_pct") or 0.875
    return _made(
        plain["mean"], plain["std"], size, math.floor(size / share), plain.get("interpolation")
    )


def _torchvision(source: Any) -> Preprocessing | None:
    if not all(hasattr(source, name) for name in ("crop_size", "resize_size", "mean", "std")):
        return None
    size, resize = _square(source.crop_size), _square(source.resize_size)
    how = getattr(source.interpolation, "value", source.interpolation)
    return _made(source.mean, source.std, size, resize, how)


def _transformers(source: Any) -> Preprocessing | None:
    if not (hasattr(source, "image_mean") and hasattr(source, "image_std")):
        return None
    size = dict(getattr(source, "size", None) or {})
    crop = dict(getattr(source, "crop_size", None) or {}) if _does(source, "do_center_crop") else {}
    short = size.get("shortest_edge") or _square((size.get("height", 0), size.get("width", 0)))
    share = getattr(source, "crop_pct", None)
    cut = _square((crop["height"], crop["width"])) if crop else short
    resize = math.floor(short / share) if share else short
    how = PILLOW.get(int(getattr(source, "resample", None) or 2))
    if not _does(source, "do_normalize"):
        return _made([0.0] * 3, [1.0] * 3, cut, resize, how)
    return _made(source.image_mean, source.image_std, cut, max(resize, cut), how)


def _does(processor: Any, step: str) -> bool:
    return bool(getattr(processor, step, False))


def _processor(model: Any) -> Any:
    """Load a transformers model's image processor, where transformers is installed."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        return None
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(name)
    except (ImportError, OSError, ValueError):
        return None


def _square(sides: Any) -> int:
    both = [int(side) for side in (sides if isinstance(sides, list | tuple) else [sides])]
    if len(set(both)) != 1 or both[0] < 1:
        raise UsageError(
            f"the classifier's images must be square, not {both}; frame them yourself."
        )
    return both[0]


def _made(mean: Any, std: Any, size: int, resize: int, how: str | None) -> Preprocessing:
    known = how if how in INTERPOLATIONS else "bicubic"
    return Preprocessing(
        mean=tuple(map(float, mean)),
        std=tuple(map(float, std)),
        size=size,
        resize=max(resize, size),
        interpolation=known,
    )
