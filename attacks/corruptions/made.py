"""The fifteen common corruptions at five severities (Hendrycks, Dietterich 2019).

The numbers are those of CIFAR-10-C. Lengths in pixels hold for images of up to 32 pixels and grow
with larger ones. Two things differ from the published files: frost is a procedural texture instead
of photographs, and motion blur is a one-sided Gaussian streak with bilinear samples, not
ImageMagick's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ebm_defense.attacks.spec import near
from ebm_defense.errors import UsageError
from ebm_defense.interface.images import check_images
from ebm_defense.noise import chain_keys
from ebm_defense.purifiers.baselines import Jpeg

Array = np.ndarray[Any, Any]
"""One image `[H, W, C]`, float64 in [0, 1]."""

Apply = Callable[[Array, np.random.Generator, Any], Array]
SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED_SIZE = 32
LUMA = np.array([0.299, 0.587, 0.114])
FROST_TINT = np.array([0.9, 0.97, 1.0])


class Corruption(NamedTuple):
    """How images are corrupted, and the setting of each severity.

    Attributes:
        apply: (image, draws, setting) -> corrupted image, clipped to [0, 1] afterwards.
        settings: one a severity.
    """

    apply: Apply
    settings: tuple[Any, Any, Any, Any, Any]


def gaussian_noise(x: Array, rng: np.random.Generator, std: float) -> Array:
    """Add normal noise of this standard deviation."""
    return x + std * rng.standard_normal(x.shape)


def shot_noise(x: Array, rng: np.random.Generator, photons: float) -> Array:
    """Count photons: white is `photons` of them on average."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Array, rng: np.random.Generator, share: float) -> Array:
    """Turn this share of values black or white."""
    draw, white = rng.random(x.shape), rng.random(x.shape) < 0.5
    return np.where(draw < share, white, x)


def defocus_blur(x: Array, rng: np.random.Generator, lens: tuple[float, float]) -> Array:
    """Blur with a disk of this radius whose edge is softened by a narrow Gaussian."""
    radius, soft = lens[0] * _scale(x), lens[1]
    reach = math.ceil(radius) + 1
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk, soft, radius=1, mode="constant")
    return ndimage.convolve(x, (kernel / kernel.sum())[..., None], mode="mirror")


def glass_blur(x: Array, rng: np.random.Generator, glass: tuple[float, int, int]) -> Array:
    """Blur, let every pixel change places with one up or left of it, and blur again."""
    std, reach, rounds = glass[0] * _scale(x), round(glass[1] * _scale(x)), glass[2]
    height, width, channels = x.shape
    order = list(range(height * width))
    for moves in rng.integers(0, reach + 1, (rounds, height * width, 2)).tolist():
        for here in reversed(range(height * width)):
            row, column = here // width - moves[here][0], here % width - moves[here][1]
            other = max(row, 0) * width + max(column, 0)
            order[here], order[other] = order[other], order[here]
    moved = _blur(x, std).reshape(-1, channels)[order].reshape(x.shape)
    return _blur(moved, std)


def motion_blur(x: Array, rng: np.random.Generator, streak: tuple[float, float]) -> Array:
    """Smear along a direction within 45 degrees of the horizontal."""
    return _smear(x, *streak, rng.uniform(-45.0, 45.0))


def zoom_blur(x: Array, rng: np.random.Generator, largest: float) -> Array:
    """Average the image with itself zoomed by up to this factor, in steps of 0.01."""
    factors = 1.0 + 0.01 * np.arange(round((largest - 1.0) * 100) + 1)
    return np.mean([x, *(_zoom(x, factor) for factor in factors)], axis=0)


def snow(x: Array, rng: np.random.Generator, weather: tuple[float, ...]) -> Array:
    """Whiten the image and let flakes fall, streaked by the wind."""
    mean, std, size, threshold, radius, blur, kept = weather
    flakes = _zoom(rng.normal(mean, std, (*x.shape[:2], 1)), size * _scale(x))
    flakes = np.where(flakes < threshold, 0.0, flakes).clip(0.0, 1.0)
    flakes = _smear(flakes, radius, blur, rng.uniform(-135.0, -45.0))
    white = np.maximum(x, 1.5 * _gray(x) + 0.5)
    return kept * x + (1.0 - kept) * white + flakes + flakes[::-1, ::-1]


def frost(x: Array, rng: np.random.Generator, ice: tuple[float, float]) -> Array:
    """Mix the image with needles of ice: ridges of fractal noise, drawn out in one direction."""
    ridges = 1.0 - np.abs(2.0 * _plasma(rng, x.shape, 1.2) - 1.0)
    needles = _smear(ridges**3, 4.0, 1.5, rng.uniform(0.0, 360.0))
    texture = needles / max(float(needles.max()), 1e-12)
    tint = FROST_TINT if x.shape[2] == 3 else np.ones(1)
    return ice[0] * x + ice[1] * texture * tint


def fog(x: Array, rng: np.random.Generator, air: tuple[float, float]) -> Array:
    """Add fractal mist and darken again to the image's own brightest value."""
    amount, decay = air
    brightest = float(x.max())
    misty = x + amount * _plasma(rng, x.shape, decay)
    return misty * brightest / (brightest + amount)


def brightness(x: Array, rng: np.random.Generator, more: float) -> Array:
    """Raise the value of every pixel, hue and saturation kept."""
    if x.shape[2] != 3:
        return x + more
    from skimage.color import hsv2rgb, rgb2hsv

    hsv = rgb2hsv(x)
    hsv[..., 2] = (hsv[..., 2] + more).clip(0.0, 1.0)
    return np.asarray(hsv2rgb(hsv))


def contrast(x: Array, rng: np.random.Generator, kept: float) -> Array:
    """Draw every channel to its mean, keeping this share of the difference."""
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * kept + mean


def elastic_transform(x: Array, rng: np.random.Generator, rubber: tuple[float, ...]) -> Array:
    """Move three corners at random and shake every pixel smoothly; shares of the image's size.

    As published, stronger severities shake more and move the corners less, so the mean change of
    pixels does not grow with severity.
    """
    strength, smooth, corners = (share * min(x.shape[:2]) for share in rubber)
    grid = np.indices(x.shape[:2]).astype(np.float64)
    shakes = [rng.uniform(-1.0, 1.0, x.shape[:2]) for _ in range(2)]
    moved = _affine(grid, rng.uniform(-corners, corners, (3, 2)))
    for axis, shake in enumerate(shakes):
        moved[axis] += strength * ndimage.gaussian_filter(shake, smooth, truncate=3.0)
    return _sample(x, moved, "mirror")


def pixelate(x: Array, rng: np.random.Generator, share: float) -> Array:
    """Shrink to this share of height and width and grow again, both by box averages."""
    height, width = x.shape[:2]
    small = max(int(height * share), 1), max(int(width * share), 1)
    return _resize(_resize(x, small), (height, width))


def jpeg_compression(x: Array, rng: np.random.Generator, quality: int) -> Array:
    """Compress as JPEG of this quality."""
    return Jpeg(quality).filter(x)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(
        defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Corruption(
        glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Corruption(motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": Corruption(zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1.0, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1.0, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(frost, ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "brightness": Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        elastic_transform,
        (
            (0.0, 0.0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
    ),
    "pixelate": Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40)),
}


def check_corruption(name: str, severity: int = 1) -> None:
    """Refuse an unknown corruption or severity."""
    if name not in CORRUPTIONS:
        raise UsageError(f"unknown corruption {name!r}; {near(name, CORRUPTIONS)}.")
    if severity not in SEVERITIES:
        raise UsageError(f"a severity is a whole number from 1 to 5, not {severity}.")


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    ids: Sequence[int] | None = None,
    seed: int = 0,
) -> Tensor:
    """Corrupt images; an image's draws depend on (seed, corruption, its number) alone.

    All severities of an image share their draws, so that they can be compared.

    Args:
        images: `[N, C, H, W]` in [0, 1]; JPEG takes 1 or 3 channels.
        name: a name in `CORRUPTIONS`.
        severity: 1 to 5.
        ids: the images' own numbers; 0 to N − 1 if not given.
        seed: seed of all draws.

    Raises:
        UsageError: images outside [0, 1] or NaN, or an unknown corruption or severity.
    """
    check_images(images)
    check_corruption(name, severity)
    numbers = range(len(images)) if ids is None else ids
    keys = chain_keys(seed, f"corruption {name}", numbers, range(1))[0]
    arrays = images.permute(0, 2, 3, 1).double().cpu().numpy()
    pairs = zip(arrays, keys.tolist(), strict=True)
    made = [_one(array, name, severity, key) for array, key in pairs]
    if not made:
        return images.clone()
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).to(images)


def _one(x: Array, name: str, severity: int, key: int) -> Array:
    corruption = CORRUPTIONS[name]
    rng = np.random.default_rng(key % 2**64)
    return corruption.apply(x, rng, corruption.settings[severity - 1]).clip(0.0, 1.0)


def _scale(x: Array) -> float:
    """Return how much larger than the published images this one is, at least 1."""
    return max(1.0, min(x.shape[:2]) / PUBLISHED_SIZE)


def _gray(x: Array) -> Array:
    weights = LUMA if x.shape[2] == 3 else np.full(x.shape[2], 1.0 / x.shape[2])
    return (x * weights).sum(2, keepdims=True)


def _blur(x: Array, std: float) -> Array:
    return ndimage.gaussian_filter(x, (std, std, 0), mode="nearest")


def _smear(x: Array, radius: float, std: float, degrees: float) -> Array:
    """Average the image with itself moved along a direction, by a one-sided Gaussian weight."""
    scale, angle = _scale(x), math.radians(degrees)
    offsets = np.arange(math.ceil(min(2 * radius, 3 * std) * scale) + 1)
    weights = np.exp(-0.5 * (offsets / (std * scale)) ** 2)
    towards = math.sin(angle), math.cos(angle), 0.0
    moved = [ndimage.shift(x, [o * t for t in towards], order=1, mode="nearest") for o in offsets]
    return np.tensordot(weights / weights.sum(), np.stack(moved), 1)


def _zoom(x: Array, factor: float) -> Array:
    """Zoom into the middle of an image, keeping its size."""
    centre = (np.array(x.shape[:2]) - 1.0) / 2.0
    grid = np.indices(x.shape[:2]).astype(np.float64)
    middle = centre[:, None, None]
    return _sample(x, (grid - middle) / factor + middle, "nearest")


def _sample(x: Array, places: Array, mode: Literal["mirror", "nearest"]) -> Array:
    """Read an image bilinearly at `[2, H, W]` places."""
    channels = [
        ndimage.map_coordinates(x[..., c], places, order=1, mode=mode) for c in range(x.shape[2])
    ]
    return np.stack(channels, axis=-1)


def _affine(grid: Array, moves: Array) -> Array:
    """Return the places to read so that three corners around the middle move by `moves`."""
    height, width = grid.shape[1:]
    middle, reach = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    homogeneous = np.concatenate([corners + moves, np.ones((3, 1))], axis=1)
    back = np.linalg.solve(homogeneous, corners.astype(np.float64))
    flat = np.concatenate([grid.reshape(2, -1), np.ones((1, height * width))])
    return (back.T @ flat).reshape(grid.shape)


def _plasma(rng: np.random.Generator, shape: tuple[int, ...], decay: float) -> Array:
    """Return fractal noise `[H, W, 1]` in [0, 1]: octaves that weaken by decay² each."""
    height, width = shape[:2]
    field = np.zeros((height, width))
    for octave in range(max(1, math.ceil(math.log2(max(height, width)))) + 1):
        cells = 2**octave + 1
        coarse = rng.uniform(-1.0, 1.0, (cells, cells))
        places = np.mgrid[: cells - 1 : height * 1j, : cells - 1 : width * 1j]
        layer = ndimage.map_coordinates(coarse, places, order=1, mode="nearest")
        field += layer / decay ** (2 * octave)
    field -= field.min()
    return (field / max(float(field.max()), 1e-12))[..., None]


def _resize(x: Array, size: tuple[int, int]) -> Array:
    from PIL import Image

    channels = [
        np.asarray(
            Image.fromarray(x[..., c].astype(np.float32)).resize(
                (size[1], size[0]), Image.Resampling.BOX
            )
        )
        for c in range(x.shape[2])
    ]
    return np.stack(channels, axis=-1).astype(np.float64)
