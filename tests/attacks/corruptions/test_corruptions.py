"""Common corruptions: made here, and read from files."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from ebm_defense import UsageError
from ebm_defense.attacks.corruptions.made import CORRUPTIONS, SEVERITIES, corrupt
from ebm_defense.attacks.corruptions.read import corruptions_in, read_corrupted

# As published these trade one kind of change for another between some severities.
UNEVEN = ("elastic_transform", "frost", "glass_blur")


@pytest.fixture(scope="module")
def gray(sample):
    return sample.images[:6]


@pytest.fixture(scope="module")
def colour(gray):
    """Colour images of 16×20 pixels: not square, with smooth ramps and sharp edges."""
    left = gray[:3, :, 6:22, 4:24]
    ramp = torch.linspace(0.1, 0.9, 20).expand(3, 1, 16, 20)
    return torch.cat([left, 0.5 * left + 0.5 * ramp, ramp], dim=1)


def test_the_fifteen_are_there() -> None:
    assert len(CORRUPTIONS) == 15
    assert all(len(corruption.settings) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_changes_images_and_grows_with_severity(gray, colour, name) -> None:
    for images in (gray, colour):
        changes = []
        for severity in SEVERITIES:
            made = corrupt(images, name, severity, seed=3)
            assert made.shape == images.shape
            assert made.dtype == images.dtype
            assert made.min() >= 0
            assert made.max() <= 1
            change = (made - images).abs().flatten(1).mean(1)
            assert bool((change > 1e-4).all())
            changes.append(float(change.mean()))
        if name not in UNEVEN:
            assert all(b > 0.93 * a for a, b in pairwise(changes)), changes
            assert changes[-1] > 1.25 * changes[0]


def test_glass_shuffles_more_in_two_rounds(gray) -> None:
    one, two = (
        float((corrupt(gray, "glass_blur", severity) - gray).abs().mean()) for severity in (3, 5)
    )
    assert two > one


def test_frost_hides_the_image_and_adds_ice_by_the_published_shares(gray) -> None:
    dark = 0.2 * gray[:1], 0.2 * gray[1:2]
    ice = corrupt(torch.zeros_like(dark[0]), "frost", 1, ids=[4]) / 0.2
    assert float(ice.mean()) > 0.2
    for severity, (kept, share) in enumerate(CORRUPTIONS["frost"].settings, 1):
        for image in dark:
            made = corrupt(image, "frost", severity, ids=[4])
            torch.testing.assert_close(made, kept * image + share * ice, rtol=0.0, atol=1e-5)


def test_elastic_shakes_neighbouring_pixels_apart_the_more_the_severer() -> None:
    ramp = torch.linspace(0, 1, 28).expand(4, 1, 28, 28).contiguous()
    inside = (slice(None), slice(None), slice(8, 20), slice(8, 20))

    def roughness(severity: int) -> float:
        moved = corrupt(ramp, "elastic_transform", severity)[inside]
        return float(moved.diff(n=2, dim=3).abs().mean())

    shakes = [roughness(severity) for severity in SEVERITIES]
    assert shakes[0] < 1e-5  # an affine map keeps a ramp straight
    assert shakes[4] > 2 * shakes[2] > 0


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_depend_on_seed_and_number_alone(gray, name) -> None:
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    together = corrupt(gray[:3], name, 3, seed=1)
    alone = corrupt(gray[2:3], name, 3, ids=[2], seed=1)
    assert torch.equal(alone, together[2:])
    after = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("name", ["gaussian_noise", "glass_blur", "snow", "frost", "fog"])
def test_another_seed_or_number_draws_otherwise(gray, name) -> None:
    first = corrupt(gray[:1], name, 3, seed=1)
    assert not torch.equal(corrupt(gray[:1], name, 3, seed=2), first)
    assert not torch.equal(corrupt(gray[:1], name, 3, ids=[7], seed=1), first)


def test_known_values() -> None:
    flat = torch.full((1, 3, 12, 12), 0.5)
    assert torch.allclose(corrupt(flat, "brightness", 2), torch.tensor(0.6), atol=1e-6)
    assert torch.allclose(corrupt(flat, "contrast", 5), flat, atol=1e-6)
    for blur in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"):
        assert torch.allclose(corrupt(flat, blur, 5), flat, atol=1e-5), blur
    noisy = corrupt(torch.full((1, 1, 200, 200), 0.5), "gaussian_noise", 1)
    assert float(noisy.std()) == pytest.approx(0.04, rel=0.02)
    struck = corrupt(torch.full((1, 1, 200, 200), 0.5), "impulse_noise", 5)
    assert float((struck != 0.5).float().mean()) == pytest.approx(0.07, rel=0.1)
    counted = corrupt(torch.full((1, 1, 200, 200), 0.5), "shot_noise", 5)
    assert float(counted.var()) == pytest.approx(0.5 / 50, rel=0.05)
    ramp = torch.linspace(0, 1, 12).expand(1, 1, 12, 12)
    dull = corrupt(ramp, "contrast", 2)
    torch.testing.assert_close(dull - 0.5, 0.5 * (ramp - 0.5), rtol=0.0, atol=1e-6)


def test_no_images_give_no_images(gray) -> None:
    assert corrupt(gray[:0], "fog", 1).shape == gray[:0].shape


@pytest.mark.parametrize(
    ("name", "severity", "said"),
    [("fogg", 1, "near it are fog"), ("fog", 0, "from 1 to 5"), ("fog", 6, "from 1 to 5")],
)
def test_mistakes_are_named(gray, name, severity, said) -> None:
    with pytest.raises(UsageError, match=said):
        corrupt(gray, name, severity)
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        corrupt(2 * gray, "fog", 1)


# Files.


def write_folder(folder, shape=(8, 8, 3), count=4):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5 * count, *shape), dtype=np.uint8)
    labels = np.tile(np.arange(count, dtype=np.uint8), 5)
    np.save(folder / "fog.npy", pixels)
    np.save(folder / "snow.npy", pixels[::-1])
    np.save(folder / "labels.npy", labels)
    return pixels, labels


@pytest.mark.parametrize("shape", [(8, 8, 3), (8, 8)])
def test_files_like_cifar_10_c_are_read_back(tmp_path, shape) -> None:
    pixels, labels = write_folder(tmp_path / "c", shape)
    assert corruptions_in(tmp_path / "c") == ["fog", "snow"]
    images, found = read_corrupted(tmp_path / "c", "fog", 3)
    assert images.shape == (4, 3 if len(shape) == 3 else 1, 8, 8)
    back = (images * 255).round().byte().permute(0, 2, 3, 1).numpy().reshape(4, *shape)
    assert np.array_equal(back, pixels[8:12])
    assert found.tolist() == labels[8:12].tolist()
    some = read_corrupted(tmp_path / "c", "fog", 3, torch.tensor([3, 0]))
    assert torch.equal(some.images, images[[3, 0]])
    assert some.labels.tolist() == [3, 0]


def test_labels_may_be_given_once(tmp_path) -> None:
    write_folder(tmp_path / "c")
    np.save(tmp_path / "c" / "labels.npy", np.arange(4))
    assert read_corrupted(tmp_path / "c", "fog", 5).labels.tolist() == [0, 1, 2, 3]


def test_files_that_are_not_what_they_must_be(tmp_path) -> None:
    with pytest.raises(UsageError, match="no folder of corruptions"):
        corruptions_in(tmp_path)
    folder = tmp_path / "c"
    write_folder(folder)
    with pytest.raises(UsageError, match=r"holds no frost.npy; it holds fog, snow"):
        read_corrupted(folder, "frost", 1)
    with pytest.raises(UsageError, match="from 1 to 5"):
        read_corrupted(folder, "fog", 9)
    np.save(folder / "rest.npy", np.zeros((19, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="five severities"):
        read_corrupted(folder, "rest", 1)
    np.save(folder / "films.npy", np.zeros((20, 7, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(UsageError, match="3 or 4 dimensions"):
        read_corrupted(folder, "films", 1)
    np.save(folder / "floats.npy", np.zeros((20, 8, 8, 3)))
    with pytest.raises(UsageError, match="uint8"):
        read_corrupted(folder, "floats", 1)
    (folder / "torn.npy").write_bytes((folder / "fog.npy").read_bytes()[:300])
    with pytest.raises(UsageError, match=r"torn.npy is damaged"):
        read_corrupted(folder, "torn", 1)
    np.save(folder / "pickled.npy", np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"no plain .npy"):
        read_corrupted(folder, "pickled", 1)
