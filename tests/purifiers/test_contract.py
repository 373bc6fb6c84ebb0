"""What every purifier says of itself is enough to save, load, attack, report and verify it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.attacks.gradients.registry import GRADIENTS
from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.eval import evaluate
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.reverify import reverify
from ebm_defense.generators.networks import (
    ConvEncoder,
    ConvGenerator,
    ConvSettings,
    LatentClassifier,
    LatentClassifierSettings,
    LatentEnergy,
    LatentEnergySettings,
    PairEnergy,
    PairEnergySettings,
)
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.attributes import AttributePurifier
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.diffusion import DiffusionPurifier, LikelihoodPurifier
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier
from ebm_defense.purifiers.registry import PURIFIERS, baseline, baselines, caption
from ebm_defense.storage.folders import read_settings, save_defense
from ebm_defense.storage.weights import load_defense

TINY = UNetSettings(
    channels=1, out_channels=1, image_size=8, block_out_channels=(8, 8), layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
)  # fmt: skip


class Blur(Purifier):
    """The mean of each pixel and its neighbours, `times` over: all that a new purifier needs."""

    caption = "box blur, {times} times"
    stochastic = False
    differentiable = True

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.register_buffer("kernel", torch.full((1, 1, 3, 3), 1 / 9))

    def purify(self, images, noise):
        flat = images.flatten(0, 1)[:, None]
        for _ in range(self.times):
            flat = nn.functional.conv2d(flat, self.kernel.to(flat), padding=1)
        return flat.view_as(images)


class Pair(SteppedPurifier):
    """A chain whose state is no image: the image pulled to a slowly moving anchor."""

    caption = "pulled to an anchor in {steps} steps"

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = self.chain_steps = steps

    def enter(self, images):
        return {"x": images, "anchor": images.mean((2, 3))}

    def leave(self, state):
        return state["x"]

    def advance(self, state, noise, steps):
        x, anchor = state["x"], state["anchor"]
        for k in steps:
            x = x + 0.1 * (anchor[..., None, None] - x) + 0.01 * noise.normal(k, x)
            anchor = 0.9 * anchor + 0.1 * x.mean((2, 3)) ** 2
        return {"x": x, "anchor": anchor}


def energy() -> ConvEnergy:
    torch.manual_seed(0)
    return ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))


def generator() -> tuple[nn.Module, nn.Module]:
    """Return a generator of 8 × 8 pixels from 3 numbers, and its encoder."""
    torch.manual_seed(0)
    shape = ConvSettings(latent=3, image_size=8, width=2)
    return ConvGenerator(shape), ConvEncoder(shape)


def denoiser() -> nn.Module:
    torch.manual_seed(0)
    # As loaded ones are: torch's attention rounds otherwise where weights may learn.
    return UNetDenoiser(TINY).requires_grad_(False)


ATTRIBUTES = LatentClassifierSettings(size=3, values=(3, 2), hidden=4)
PAIRS = PairEnergySettings(latent=3, image_size=8, width=2, hidden=4)

MAKE = {
    "none": lambda: baseline("none"),
    "gaussian": lambda: baseline("gaussian:0.1"),
    "jpeg": lambda: baseline("jpeg:75"),
    "bits": lambda: baseline("bits:3"),
    "tv": lambda: baseline("tv:0.1"),
    "median": lambda: baseline("median:3"),
    "langevin": lambda: LangevinPurifier(energy(), 2, 0.05, 0.01),
    "hat": lambda: HatPurifier(energy(), *generator(), 2, 0.05, 0.05, 0.01),
    "gebm": lambda: GEBMPurifier(energy(), *generator(), 2),
    "latent": lambda: LatentPurifier(LatentEnergy(LatentEnergySettings(size=3)), *generator(), 2),
    "diffusion": lambda: DiffusionPurifier(denoiser(), 20, 3, guidance=0.5),
    "likelihood": lambda: LikelihoodPurifier(denoiser(), 2),
    "pair": lambda: PairPurifier(PairEnergy(PAIRS), generator()[1], 2, 0.05, 0.05, 0.01),
    "attributes": lambda: AttributePurifier(LatentClassifier(ATTRIBUTES), *generator(), 2),
    "blur": lambda: Blur(2),
    "anchored": lambda: Pair(3),
}
"""One of each name; whoever registers another purifier adds its line."""


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setitem(PURIFIERS, "blur", Blur)
    monkeypatch.setitem(PURIFIERS, "anchored", Pair)
    return PURIFIERS


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return normalized(
        WideResNet(WideResNetSettings(channels=1, classes=3, depth=10, widen=1)), 0.5, 0.5
    )


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_registered_purifier_is_walked(registry):
    assert set(MAKE) == set(registry)


@pytest.mark.parametrize("name", MAKE)
def test_a_purifier_is_saved_loaded_evaluated_reported_and_verified(
    name, registry, classifier, tmp_path
):
    defense = PurifiedClassifier(classifier, MAKE[name](), replicates=2, seed=0)
    folder = save_defense(defense, tmp_path / "defense")
    loaded = load_defense(folder, seed=0)
    assert type(loaded.purifier) is registry[name]
    assert loaded.purifier.numbers == defense.purifier.numbers == read_settings(folder).purifier[1]
    keys = chain_keys(0, "contract", range(2), range(2))
    with torch.no_grad():
        assert torch.equal(
            loaded.purify_replicates(images(), keys), defense.purify_replicates(images(), keys)
        )
    attack = PGD(threat=ThreatModel(eps=0.1), steps=1, replicates=2)
    labels = torch.tensor([0, 1])
    # Pictures and tables of a folder are the dearest part, and no purifier's own but its record.
    run = tmp_path / "run" if name in ("langevin", "anchored") else None
    report = evaluate(loaded, images(), labels, attacks=[attack], judge_replicates=4, out=run)
    report = report if run is None else load_run(run)
    words = caption(loaded.purifier.record(images()))
    assert words in report.to_text()
    assert "{" not in words
    assert reverify(report, loaded, seed=1).to_text()


@pytest.mark.parametrize("name", MAKE)
def test_the_gradients_that_fit_are_known_and_can_be_taken(name, registry, classifier):
    defense = PurifiedClassifier(classifier, MAKE[name](), replicates=2, seed=0)
    names = defense.purifier.gradients(images())
    assert names[-1] == "bpda"
    attack = PGD(steps=1, replicates=2, gradient=GRADIENTS[names[0]]())
    adversarial = attack(defense, images(), torch.tensor([0, 1]))
    assert adversarial.isfinite().all()


def test_the_full_gradient_goes_through_states_of_any_shape(registry):
    """Against torch's own backward pass through the same chain."""
    purifier, x = Pair(5).double(), images().double()
    noise = KeyedNoise(chain_keys(0, "contract", range(2), range(1))[0])
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    full = GRADIENTS["full"](store="checkpoints")
    found = full.differentiate(purifier, x, noise, 0.0).vjp(upstream)
    x = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(purifier.purify(x, noise), x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_images_on_the_way_are_those_of_shorter_chains(registry):
    noise = KeyedNoise(chain_keys(0, "contract", range(2), range(1))[0])
    for name in ("anchored", "langevin"):
        purifier = MAKE[name]()
        seen = purifier.on_the_way(images(), noise, (0, 1, purifier.chain_steps))
        assert list(seen) == [0, 1, purifier.chain_steps]
        torch.testing.assert_close(seen[0], images(), rtol=0, atol=1e-6)
        assert torch.equal(seen[purifier.chain_steps], purifier.purify(images(), noise))
    assert list(MAKE["blur"]().on_the_way(images(), noise, (0, 1))) == [0]


def test_a_new_purifier_has_its_name_on_the_command_line(registry):
    assert "blur:NUMBER" in baselines()
    assert baseline("blur:3").numbers == {"times": 3}
    with pytest.raises(UsageError, match="needs a number"):
        baseline("blur:2.5")


def test_a_record_of_a_class_that_is_not_here_is_told_by_its_numbers():
    assert caption({"kind": "Sharpen", "by": 0.5, "twice": True}) == "Sharpen by 0.5"
    assert caption({"kind": "GaussianNoise", "sigma": 0.5}) == "GaussianNoise sigma 0.5"
