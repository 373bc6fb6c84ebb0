"""A classifier as it was downloaded, behind a purifier, in one call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.tiled import COVER
from ebm_defense.errors import UsageError
from ebm_defense.interface.preprocessing import Preprocessing, preprocessing_of
from ebm_defense.noise import Noise
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.foreign import as_purifier
from ebm_defense.purifiers.registry import baseline
from ebm_defense.runtime.packing import USUAL
from ebm_defense.storage.folders import names_folder
from ebm_defense.storage.weights import load_purifier

FITS = ("tiles", "own size")
NONE_SHIPS = (
    "no energy of such images ships with this package; train one (ebm-defense train-ebm --data "
    "folder), or take a purifier without one, such as gaussian:0.25 or jpeg:75"
)

_log = logging.getLogger("ebm_defense")


def protect(
    model: nn.Module,
    purifier: str | Callable[[Tensor], Tensor],
    *,
    preprocessing: Any = None,
    replicates: int = 16,
    fit: str = "tiles",
    **options: Any,
) -> PurifiedClassifier:
    """Put a purifier before a pretrained classifier, whose preprocessing is read off what it has.

    Args:
        model: a classifier of normalised images, of timm, torchvision, transformers or anybody.
        purifier: a shipped name or a folder, a baseline ("gaussian:0.25"), a `Purifier`, or any map
            of images to images.
        preprocessing: where `preprocessing_of` finds what the model wants, if not in the model:
            torchvision's weights, a processor, or a `Preprocessing`.
        replicates: purifications an image.
        fit: for images larger than the purifier's energy knows: "tiles" that overlap (`Tiled`), or
            "own size", which shrinks, purifies and enlarges and so loses detail.
        **options: of `PurifiedClassifier`.

    Returns:
        A defense of images `[N, C, size, size]` in [0, 1]; read photos for it with
        `preprocessing_of(…).framing`.

    Raises:
        UsageError: a model that says nothing of what it wants, a purifier that nobody knows, or one
            whose energy is of other colours or of larger images.
    """
    if fit not in FITS:
        raise UsageError(f"fit is {fit!r}; choose one of {', '.join(FITS)}.")
    wanted = preprocessing_of(model if preprocessing is None else preprocessing)
    made = _named(purifier) if isinstance(purifier, str) else as_purifier(purifier)
    fitted, chains = _fitted(made, wanted, fit)
    return PurifiedClassifier(
        wanted.wrap(model), fitted, replicates, **({"max_chains": chains} | options)
    )


def _named(name: str) -> Purifier:
    return load_purifier(name) if names_folder(name) else baseline(name)


def _fitted(purifier: Purifier, wanted: Preprocessing, fit: str) -> tuple[Purifier, int | None]:
    """Return the purifier for images of a classifier's size, and how many run at a time."""
    shape = purifier.image_shape
    if shape is None or shape == (len(wanted.mean), wanted.size, wanted.size):
        return purifier, None
    channels, size = shape[:2]
    if channels != len(wanted.mean) or size > wanted.size:
        raise UsageError(
            f"the purifier's energy is of {size}x{size} images with {channels} channels, and the "
            f"classifier's are {wanted.size}x{wanted.size} with {len(wanted.mean)}: {NONE_SHIPS}."
        )
    _log.warning(
        "the purifier's energy learned %dx%d images, which no part of a %dx%d photo is, and may "
        "destroy what the classifier needs: measure clean accuracy first; %s.",
        size, size, wanted.size, wanted.size, NONE_SHIPS,
    )  # fmt: skip
    if fit == "own size":
        return OwnSize(purifier, size), None
    tiles = (math.ceil(wanted.size / (size // COVER)) + 1) ** 2
    return purifier.tiled(), max(1, USUAL // tiles)


class OwnSize(Purifier):
    """Shrinks images to the size that a purifier knows, purifies them, and enlarges them again.

    Args:
        purifier: of small images.
        size: their height and width.
    """

    caption = "images shrunk to {size} pixels and purified there"

    def __init__(self, purifier: Purifier, size: int) -> None:
        super().__init__()
        self.purifier, self.size = purifier, size
        self.stochastic = purifier.stochastic

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.purifier.chain_steps

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        small = _resized(images, (self.size, self.size))
        return _resized(self.purifier.purify(small, noise), images.shape[-2:])


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(images, tuple(size), mode="bilinear", antialias=True, align_corners=False)
