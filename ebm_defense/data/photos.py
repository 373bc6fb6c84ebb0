"""Reading one photo as a person sees it: upright, over its whole range, nothing hidden showing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
CAMERAS = (".arw", ".cr2", ".cr3", ".dng", ".heic", ".heif", ".jxl", ".nef", ".orf", ".raf", ".rw2")
"""Photos that Pillow reads with a plugin only: to pass them over in silence would change the
data."""
INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest")
BACKGROUNDS = {"white": 255, "grey": 128, "black": 0}
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag that says how a camera was held, and its values for a quarter turn."""
BITS = 258
"""The TIFF tag of the number of bits."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How a photo becomes an image of the size and colours that are wanted.

    Attributes:
        resize: pixels of the shorter side after resizing; `crop` if only that is given, the photo's
            own if neither is.
        crop: height and width of the square that is cut from the centre.
        channels: 1 for grey, 3 for colour.
        interpolation: a name in `INTERPOLATIONS`, always with antialiasing when shrinking.
        background: a name in `BACKGROUNDS`, on which transparent pixels lie.

    Raises:
        UsageError: a setting out of range.
    """

    resize: int | None = None
    crop: int | None = None
    channels: int = 3
    interpolation: str = "bicubic"
    background: str = "white"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.channels not in (1, 3):
            raise UsageError(f"channels must be 1 or 3, not {self.channels}.")
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1 pixel, not {value}.")
        if self.crop and self.resize and self.crop > self.resize:
            raise UsageError(f"crop must be at most resize's {self.resize}, not {self.crop}.")
        for name, chosen, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("background", self.background, tuple(BACKGROUNDS)),
        ):
            if chosen not in known:
                raise UsageError(f"{name} is {chosen!r}; choose one of {', '.join(known)}.")

    @property
    def fixed(self) -> bool:
        """Whether every photo comes out in one size."""
        return self.crop is not None


def read_photo(path: Path, framing: Framing | None = None) -> Tensor:
    """Read an image file as `[C, H, W]` float32 in [0, 1].

    Upright by its EXIF orientation; 16-bit grey over its whole range; float pixels as they are,
    which must lie in [0, 1]; transparent pixels over the background. Colours become grey by ITU-R
    601 luma. Of a file of several pictures the first is read; colour profiles are not applied.

    Raises:
        UsageError: no image that can be read, or pixels whose range nobody can know.
    """
    framing = framing or Framing()
    return _opened(path, lambda image: _pixels(_prepared(image, framing), framing))


def photo_size(path: Path) -> tuple[int, int]:
    """Return an image file's width and height, upright, without reading its pixels.

    Raises:
        UsageError: no image that can be read.
    """
    return _opened(path, _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in TURNED else (width, height)


def _opened(path: Path, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return use(image)
    except UsageError as error:
        raise UsageError(f"{path} {error}") from None
    except Image.DecompressionBombError as error:
        raise UsageError(
            f"{path} is too large to be opened safely ({error}); shrink it first."
        ) from None
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        camera = path.suffix.lower() in CAMERAS
        hint = "; save it as JPEG or PNG, or install a plugin of Pillow's" if camera else ""
        raise UsageError(f"{path} is no image that can be read ({error}){hint}.") from error


def _prepared(image: Image.Image, framing: Framing) -> Image.Image:
    """Return a photo upright, as 8-bit L or RGB or, where it has more grey levels, as F."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        deep = _deep(np.asarray(upright), image)
        clear = np.asarray(upright) == upright.info.get("transparency")
        return Image.fromarray(np.where(clear, np.float32(BACKGROUNDS[framing.background]), deep))
    mode = "L" if framing.channels == 1 else "RGB"
    if not upright.has_transparency_data:
        return upright.convert(mode)
    picture = upright.convert("RGBA")
    ground = Image.new("RGBA", picture.size, (BACKGROUNDS[framing.background],) * 3 + (255,))
    return Image.alpha_composite(ground, picture).convert(mode)


def _deep(values: np.ndarray[Any, Any], image: Image.Image) -> np.ndarray[Any, Any]:
    """Return pixels of more than 8 bits on the 8-bit scale, 0 to 255, as float32 `[H, W]`."""
    low, high = float(values.min()), float(values.max())
    top = 1.0 if image.mode == "F" else 65535.0
    # A TIFF of 32-bit integers says nothing of where white is.
    wide = image.mode == "I" and np.max(getattr(image, "tag_v2", {}).get(BITS, 16)) > 16
    if wide or not (low >= 0 and high <= top):
        raise UsageError(
            f"has {'float' if image.mode == 'F' else 'integer'} pixels from {low:g} to {high:g}, "
            "and nothing says where white is; save it with 8 or 16 bits, or as floats in [0, 1]."
        )
    return values.astype(np.float32) * np.float32(255.0 / top)


def _pixels(image: Image.Image, framing: Framing) -> Tensor:
    framed = _cropped(_resized(image, framing), framing.crop)
    values = np.array(framed, dtype=np.float32)
    pixels = torch.from_numpy(values).div_(255.0).clamp_(0.0, 1.0)
    planes = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return planes.expand(framing.channels, -1, -1).contiguous()


def _resized(image: Image.Image, framing: Framing) -> Image.Image:
    short = framing.resize or framing.crop
    if short is None or min(image.size) == short:
        return image
    # The longer side is cut off, not rounded, as torchvision does it.
    width, height = (int(short * side / min(image.size)) for side in image.size)
    return image.resize((width, height), Image.Resampling[framing.interpolation.upper()])


def _cropped(image: Image.Image, crop: int | None) -> Image.Image:
    if crop is None:
        return image
    left, top = (round((side - crop) / 2.0) for side in image.size)
    return image.crop((left, top, left + crop, top + crop))
