"""A photo is read as a person sees it, whatever file it is in, or is refused by its name."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_defense.data.photos import Framing, photo_size, read_photo
from ebm_defense.errors import UsageError

RAMP = np.linspace(0, 1, 24 * 16).reshape(16, 24)
"""A picture that is wider than high, and brighter to the right and below."""


def saved(tmp_path: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_of_grey_keep_their_range(tmp_path, name):
    file = saved(tmp_path, Image.fromarray((RAMP * 65535).round().astype(np.uint16)), name)
    torch.testing.assert_close(
        read_photo(file, Framing(channels=1))[0].double(), torch.tensor(RAMP), rtol=0, atol=1e-5
    )
    assert torch.equal(*(read_photo(file)[i] for i in (0, 2)))


def test_big_endian_tiffs_and_deep_graymaps_keep_their_range(tmp_path):
    values = (RAMP * 65535).round().astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5\n24 16\n65535\n" + values.tobytes())
    found = read_photo(tmp_path / "a.pgm", Framing(channels=1))[0]
    torch.testing.assert_close(found.double(), torch.tensor(RAMP), rtol=0, atol=1e-5)


def test_float_pixels_are_taken_as_they_are(tmp_path):
    file = saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "a.tif")
    found = read_photo(file, Framing(channels=1))[0]
    torch.testing.assert_close(found.double(), torch.tensor(RAMP), rtol=0, atol=1e-6)


@pytest.mark.parametrize("values", [RAMP * 255, RAMP * 2 - 1, np.full((4, 4), np.nan)])
def test_float_pixels_of_an_unknown_range_are_refused(tmp_path, values):
    file = saved(tmp_path, Image.fromarray(values.astype(np.float32)), "a.tif")
    with pytest.raises(UsageError, match=rf"{file.name} has float pixels from .* where white is"):
        read_photo(file)


def test_whole_numbers_of_an_unknown_range_are_refused(tmp_path):
    file = saved(tmp_path, Image.fromarray((RAMP * 255).astype(np.int32)), "a.tif")
    with pytest.raises(UsageError, match="integer pixels"):
        read_photo(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    """What a camera stored turned and says so comes out as it was seen."""
    seen = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = seen.transpose(undo[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path, stored, "a.png", exif=exif)
    assert photo_size(file) == (24, 16)
    found = read_photo(file, Framing(channels=1))[0] * 255
    assert np.array_equal(found.round().numpy(), np.asarray(seen))


@pytest.mark.parametrize(
    ("background", "shows"), [("white", 1.0), ("grey", 128 / 255), ("black", 0)]
)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_transparent_pixels_show_the_ground_and_not_what_they_hide(
    tmp_path, mode, background, shows
):
    picture = Image.new("RGBA", (8, 8), (200, 200, 200, 255))
    picture.paste((10, 10, 10, 0), (0, 0, 4, 8))
    if mode == "tRNS":
        picture = Image.new("L", (8, 8), 200)
        picture.paste(10, (0, 0, 4, 8))
        file = saved(tmp_path, picture, "a.png", transparency=10)
    else:
        file = saved(tmp_path, picture.convert(mode), "a.png")
    for channels in (1, 3):
        found = read_photo(file, Framing(channels=channels, background=background))
        torch.testing.assert_close(found[:, :, :4], torch.full((channels, 8, 4), float(shows)))
        torch.testing.assert_close(found[:, :, 4:], torch.full((channels, 8, 4), 200 / 255))


def test_half_transparent_pixels_are_mixed_with_the_ground(tmp_path):
    file = saved(tmp_path, Image.new("RGBA", (2, 2), (0, 0, 0, 51)), "a.png")
    torch.testing.assert_close(read_photo(file), torch.full((3, 2, 2), 0.8), rtol=0, atol=1e-2)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_common_mode_is_read_in_grey_and_in_colour(tmp_path, mode):
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
    file = saved(tmp_path, Image.new("RGB", (8, 8), "white").convert(mode), f"a.{suffix}")
    for channels in (1, 3):
        found = read_photo(file, Framing(channels=channels))
        torch.testing.assert_close(found, torch.ones(channels, 8, 8), rtol=0, atol=0.01)


# Framing


def test_the_shorter_side_is_resized_and_the_centre_cut_out(tmp_path):
    file = saved(tmp_path, Image.fromarray((RAMP * 255).astype(np.uint8)).resize((60, 40)), "a.png")
    assert read_photo(file, Framing(resize=20)).shape == (3, 20, 30)
    assert read_photo(file, Framing(crop=20)).shape == (3, 20, 20)
    found = read_photo(file, Framing(resize=20, crop=12))
    whole = read_photo(file, Framing(resize=20))
    assert torch.equal(found, whole[:, 4:16, 9:21])


def test_resizing_is_bicubic_as_pillow_does_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    file = saved(tmp_path, Image.fromarray(pixels), "a.png")
    for name in ("bicubic", "bilinear"):
        how = Image.Resampling[name.upper()]
        expected = np.asarray(Image.fromarray(pixels).resize((12, 12), how)) / np.float32(255)
        found = read_photo(file, Framing(crop=12, interpolation=name))
        assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_deep_grey_is_resized_without_leaving_the_range(tmp_path):
    step = np.repeat([[0, 65535]], 12, axis=1).astype(np.uint16) * np.ones((24, 1), np.uint16)
    found = read_photo(saved(tmp_path, Image.fromarray(step), "a.png"), Framing(crop=10))
    assert float(found.min()) == 0
    assert float(found.max()) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"channels": 2}, "1 or 3"),
        ({"crop": 0}, "at least 1"),
        ({"resize": -3}, "at least 1"),
        ({"resize": 8, "crop": 9}, "at most"),
        ({"interpolation": "magic"}, "bicubic"),
        ({"background": "blue"}, "white"),
    ],
)
def test_framings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Framing(**settings)


# Files that are no photos


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"GIF"])
def test_what_is_no_image_is_refused_by_name(tmp_path, content):
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    for read in (read_photo, photo_size):
        with pytest.raises(UsageError, match=r"a\.jpg is no image that can be read"):
            read(file)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif"])
def test_truncated_images_are_refused_by_name(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = saved(tmp_path, Image.fromarray(noise), f"a.{suffix}")
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(UsageError, match=rf"a\.{suffix} is no image that can be read"):
        read_photo(file)


def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch):
    file = saved(tmp_path, Image.new("L", (90, 90)), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UsageError, match=r"a\.png is too large .* shrink it"):
        read_photo(file)


def test_a_clear_level_of_sixteen_bits_shows_the_background(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    values = np.where(RAMP > 0.5, RAMP * 65535, 7).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    header = struct.pack(">IIBBBBB", 24, 16, 16, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"tRNS", struct.pack(">H", 7)), chunk(b"IDAT", rows)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))
    for background, level in (("white", 1.0), ("black", 0.0)):
        found = read_photo(tmp_path / "a.png", Framing(channels=1, background=background))[0]
        expected = torch.tensor(np.where(RAMP > 0.5, RAMP, level))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
