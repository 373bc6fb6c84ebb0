"""Purifiers of one line each, that any other must beat."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real, whole
from ebm_defense.noise import Noise
from ebm_defense.purifiers.base import Purifier


class NoPurifier(Purifier):
    """Leaves images as they are: the undefended classifier."""

    caption = "none"
    stochastic = False
    identity = True
    differentiable = True

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return images


class GaussianNoise(Purifier):
    """Adds N(0, std²) noise: the control that any purifier must beat.

    Args:
        std: standard deviation ≥ 0, in [0, 1] pixel units.
    """

    caption = "Gaussian noise of standard deviation {std:g}"
    differentiable = True

    def __init__(self, std: float) -> None:
        super().__init__()
        std = real(std, "the noise's standard deviation")
        if not 0 <= std < float("inf"):
            raise UsageError(f"the noise's standard deviation must be 0 or more, not {std}.")
        self.std = std

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return images + self.std * noise.normal(0, images)


class BitDepth(Purifier):
    """Rounds pixels to 2^bits levels (Xu, Evans, Qi 2018, feature squeezing)."""

    caption = "pixels in steps of 1/{levels}"
    stochastic = False

    def __init__(self, bits: float) -> None:
        super().__init__()
        bits = whole(bits, "bits")
        if not 1 <= bits <= 8:
            raise UsageError(f"bits must be a whole number from 1 to 8, not {bits}.")
        self.levels = 2**bits - 1

    @property
    def bits(self) -> int:
        """How many bits a pixel keeps."""
        return self.levels.bit_length()

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        return (images * self.levels).round() / self.levels


class ArrayPurifier(Purifier):
    """A deterministic filter of one NumPy image `[H, W, C]` in [0, 1] at a time."""

    stochastic = False

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Filter one image `[H, W, C]`."""
        raise NotImplementedError

    def purify(self, images: Tensor, noise: Noise) -> Tensor:
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()
        out = [torch.from_numpy(np.asarray(self.filter(a))) for a in arrays]
        if not out:
            return images
        return torch.stack(out).permute(0, 3, 1, 2).to(images)


class Jpeg(ArrayPurifier):
    """JPEG compression by Pillow (Dziugaite, Ghahramani, Roy 2016), for 1 or 3 channels."""

    caption = "JPEG of quality {quality}"

    def __init__(self, quality: float) -> None:
        super().__init__()
        quality = whole(quality, "JPEG quality")
        if not 1 <= quality <= 95:
            raise UsageError(f"JPEG quality must be from 1 to 95, not {quality}.")
        self.quality = quality

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from PIL import Image

        pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
            file, "JPEG", quality=self.quality
        )
        decoded = np.asarray(Image.open(file), dtype=np.float32) / 255.0
        return decoded.reshape(image.shape)


class TotalVariation(ArrayPurifier):
    """Total-variation denoising by scikit-image's Chambolle solver (Guo et al. 2018)."""

    caption = "total variation denoising of weight {weight:g}"

    def __init__(self, weight: float) -> None:
        super().__init__()
        weight = real(weight, "the total-variation weight")
        if not weight > 0:
            raise UsageError(f"the total-variation weight must be above 0, not {weight}.")
        self.weight = weight

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from skimage.restoration import denoise_tv_chambolle

        return np.asarray(denoise_tv_chambolle(image, weight=self.weight, channel_axis=-1))


class MedianFilter(ArrayPurifier):
    """The median of a size × size window, by SciPy (Xu, Evans, Qi 2018)."""

    caption = "median of {size} × {size} pixels"

    def __init__(self, size: float) -> None:
        super().__init__()
        size = whole(size, "the median window")
        if size < 1:
            raise UsageError(f"the median window must be a whole number from 1, not {size}.")
        self.size = size

    def filter(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from scipy.ndimage import median_filter

        return np.asarray(median_filter(image, size=(self.size, self.size, 1)))
