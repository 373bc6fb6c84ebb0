"""A classifier as it was downloaded and a folder of photos become a defense in five lines."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ebm_defense import FolderSettings, LangevinPurifier, load_data, protect
from ebm_defense._torchvision import torchvision
from ebm_defense.data import read_photo
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.tiled import Tiled
from ebm_defense.errors import UsageError
from ebm_defense.interface.preprocessing import Preprocessing, preprocessing_of
from ebm_defense.noise import KeyedNoise, chain_keys

SCALE = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.5)}


class Net(nn.Module):
    """Pools its images to the logits of three classes; `cfg` is what timm would say of it."""

    def __init__(self, **cfg) -> None:
        super().__init__()
        if cfg:
            self.pretrained_cfg = cfg

    def forward(self, x):
        return x.mean((2, 3))


def energy(size: int = 8, channels: int = 3) -> ConvEnergy:
    torch.manual_seed(0)
    return ConvEnergy(ConvEnergySettings(channels=channels, image_size=size, width=2))


def chain(size: int = 8, channels: int = 3, steps: int = 2) -> LangevinPurifier:
    return LangevinPurifier(energy(size, channels), steps, 0.05, 0.01, "fp32")


# What a classifier wants


def test_timm_says_it_in_its_config():
    cfg = {"input_size": (3, 16, 16), "crop_pct": 0.8, "interpolation": "bilinear", **SCALE}
    for source in (cfg, Net(**cfg), SimpleNamespace(pretrained_cfg=SimpleNamespace(**cfg))):
        found = preprocessing_of(source)
        assert (found.size, found.resize, found.interpolation) == (16, 20, "bilinear")
        assert (found.mean, found.std) == (SCALE["mean"], SCALE["std"])


def test_torchvision_says_it_in_its_weights():
    weights = torchvision("models").ResNet50_Weights.IMAGENET1K_V2
    for source in (weights, weights.transforms()):
        found = preprocessing_of(source)
        assert (found.size, found.resize, found.interpolation) == (224, 232, "bilinear")
        assert found.mean == (0.485, 0.456, 0.406)


def test_torchvisions_own_transforms_give_the_same_images(tmp_path):
    weights = torchvision("models").ResNet50_Weights.IMAGENET1K_V2
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (300, 420, 3), dtype=np.uint8))
    theirs = weights.transforms()(photo)
    found = preprocessing_of(weights)
    photo.save(tmp_path / "photo.png")
    seen: list[torch.Tensor] = []
    found.wrap(Recorder(seen))(read_photo(tmp_path / "photo.png", found.framing)[None])
    torch.testing.assert_close(seen[0][0], theirs, rtol=0, atol=1e-5)


class Recorder(nn.Module):
    def __init__(self, seen: list) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("processor", "size", "resize"),
    [
        ({"size": {"height": 16, "width": 16}}, 16, 16),
        ({"size": {"shortest_edge": 20}, "do_center_crop": True,
          "crop_size": {"height": 16, "width": 16}}, 16, 20),
        ({"size": {"shortest_edge": 16}, "crop_pct": 0.8}, 16, 20),
    ],
)  # fmt: skip
def test_transformers_says_it_in_its_processor(processor, size, resize):
    told = {"image_mean": SCALE["mean"], "image_std": SCALE["std"], "do_normalize": True}
    found = preprocessing_of(SimpleNamespace(**told, resample=3, **processor))
    assert (found.size, found.resize, found.interpolation) == (size, resize, "bicubic")
    assert found.std == SCALE["std"]


@pytest.mark.parametrize("source", [Net(), {"mean": (0.5,)}, None, 3])
def test_what_says_nothing_is_asked(source):
    with pytest.raises(UsageError, match="preprocessing="):
        preprocessing_of(source)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UsageError, match="square"):
        preprocessing_of({"input_size": (3, 16, 24), **SCALE})


# Behind a purifier


def test_a_downloaded_classifier_and_a_folder_of_photos_take_five_lines(tmp_path):
    write_photos(tmp_path)
    model, weights = Net(), torchvision("models").ResNet18_Weights.DEFAULT

    defend = protect(model, "gaussian:0.1", preprocessing=weights)
    photos = FolderSettings(framing=preprocessing_of(weights).framing)
    images, labels = load_data("folder", root=tmp_path, folder=photos)
    right = defend(images).argmax(1) == labels

    assert images.shape == (4, 3, 224, 224)
    assert right.shape == (4,)


def write_photos(root):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(2):
            pixels = rng.integers(0, 256, (250, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg")


def test_the_model_gets_the_scale_that_it_wants():
    cfg = {"input_size": (3, 8, 8), **SCALE}
    x = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(SCALE[k]).view(3, 1, 1) for k in ("mean", "std"))
    expected = Net()((x - mean) / std)
    torch.testing.assert_close(protect(Net(**cfg), "none")(x), expected)
    told = Preprocessing(**SCALE, size=8, resize=8)
    torch.testing.assert_close(protect(Net(), "none", preprocessing=told)(x), expected)


def test_an_energy_of_the_same_size_is_taken_as_it_is(caplog):
    purifier = chain(16)
    told = Preprocessing(**SCALE, size=16, resize=16)
    assert protect(Net(), purifier, preprocessing=told).purifier is purifier
    assert not caplog.text


@pytest.mark.parametrize("fit", ["tiles", "own size"])
def test_larger_images_are_purified_with_a_warning_and_the_same_noise_in_any_batch(caplog, fit):
    told = Preprocessing(**SCALE, size=20, resize=20)
    with caplog.at_level(logging.WARNING):
        defend = protect(Net(), chain(), preprocessing=told, fit=fit)
    assert "measure clean accuracy first; no energy of such images ships" in caplog.text
    x = torch.rand((3, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    keys = chain_keys(0, "test", range(3), range(2))
    whole = defend.purify_replicates(x, keys)
    assert whole.shape == (2, 3, 3, 20, 20)
    alone = defend.purify_replicates(x[1:2], keys[:, 1:2])
    torch.testing.assert_close(whole[:, 1:2], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("purifier", [chain(24), chain(8, channels=1), "fashion-mnist"])
def test_an_energy_of_other_images_is_refused_in_an_honest_sentence(purifier):
    told = Preprocessing(**SCALE, size=20, resize=20)
    with pytest.raises(UsageError, match=r"no energy of such images ships .* train one"):
        protect(Net(), purifier, preprocessing=told)


@pytest.mark.parametrize("options", [{"purifier": "magic:3"}, {"fit": "stretch"}])
def test_unknown_purifiers_and_fits_are_refused(options):
    told = Preprocessing(**SCALE, size=8, resize=8)
    with pytest.raises(UsageError, match="choose"):
        protect(Net(), **({"purifier": "none", "preprocessing": told} | options))


# Tiles


@pytest.mark.parametrize("shape", [(8, 8), (20, 20), (17, 23), (9, 8)])
def test_every_pixel_lies_in_four_tiles(shape):
    """Where U is the sum of all pixels the tiled slope is 1; reflections add to it at the edges."""

    class Linear(nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1)

    x = torch.zeros((2, 3, *shape), requires_grad=True)
    tiled = Tiled(Linear(), 8)
    (slope,) = torch.autograd.grad(tiled(x).sum(), x)
    inner = slope[:, :, 5 : shape[0] - 8, 5 : shape[1] - 8]
    assert torch.equal(inner, torch.ones_like(inner))
    assert float(slope.min()) >= 1


def test_tiles_are_cut_where_they_lie():
    x = torch.arange(256.0).view(1, 1, 16, 16)
    tiles = Tiled(nn.Identity(), 8).tiles(x)
    assert tiles.shape == (1, 25, 1, 8, 8)
    assert torch.equal(tiles[0, 6, 0], x[0, 0, :8, :8])
    assert torch.equal(tiles[0, 12, 0], x[0, 0, 4:12, 4:12])


def test_tiled_chains_move_by_the_mean_slope_of_four_tiles():
    purifier = chain(steps=1).tiled()
    x = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    keys = chain_keys(0, "test", range(1), range(1))[0]
    moved = purifier.purify(x, KeyedNoise(keys)) * 2 - 1
    start = (x * 2 - 1).requires_grad_()
    (slope,) = torch.autograd.grad(Tiled(energy(), 8)(start).sum(), start)
    expected = start - 0.05**2 / 0.02 * slope + 0.05 * KeyedNoise(keys).normal(0, start)
    torch.testing.assert_close(moved, expected.detach(), rtol=0, atol=1e-5)


def test_images_smaller_than_a_tile_and_odd_tiles_are_refused():
    with pytest.raises(UsageError, match="smaller than"):
        Tiled(energy(), 8)(torch.zeros(1, 3, 7, 9))
    with pytest.raises(UsageError, match="even"):
        Tiled(energy(), 7)
