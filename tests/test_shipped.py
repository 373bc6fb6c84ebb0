"""The defenses that ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ebm_defense import load_data, load_defense, load_energy, load_purifier
from ebm_defense.commands.main import parse
from ebm_defense.commands.training.train_ebm import TrainEbm
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.storage.folders import learned, shipped, shipped_folder, verify

NAMES = [
    "fashion-mnist",
    "fashion-mnist-adversarial",
    "fashion-mnist-gaussian",
    "fashion-mnist-longrun",
    "fashion-mnist-together",
]


def test_these_ship_each_with_a_card_and_hashes() -> None:
    assert [s.name for s in shipped()] == NAMES
    for name, settings in shipped():
        verify(shipped_folder() / name)
        assert settings.description
        card = (shipped_folder() / name / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in ("Recipe", "Data", "Licence", "ebm-defense train-"))


ENERGIES = ["fashion-mnist-midrun", "fashion-mnist-persistent"]


def test_these_energies_ship_alone_each_with_its_recipe_card_and_hashes() -> None:
    assert learned() == ENERGIES
    for name in ENERGIES:
        folder = shipped_folder() / name
        verify(folder)
        assert sum(file.stat().st_size for file in folder.iterdir()) < 1_500_000
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in ("Recipe", "Data", "Licence", "Measured"))
        command = parse(TrainEbm, "train-ebm", ["--recipe", name, "--out", "somewhere"])
        energy = load_energy(name)
        said = energy.settings
        assert (command.width, command.activation) == (said.width, said.activation)
        assert energy(load_data("fashion-mnist-sample", limit=2).images).shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_defense_classifies_the_sample(name: str) -> None:
    images, labels = load_data("fashion-mnist-sample", limit=100)
    defense = load_defense(name, replicates=2, seed=0)
    with torch.no_grad():
        right = (defense(images).argmax(-1) == labels).float().mean()
        undefended = (defense.undefended(images).argmax(-1) == labels).float().mean()
    # 82% and 92% on 1,000 test images; four standard errors of 100 images below.
    assert right > 0.66
    assert undefended > 0.80


@pytest.mark.parametrize(
    "name", ["fashion-mnist-longrun", "fashion-mnist", "fashion-mnist-together"]
)
def test_bf16_chains_purify_as_fp32_ones_do(name: str) -> None:
    """Same noise: means and spreads agree to within a margin well under their own size.

    The margins are what is shown, not what could not be rejected: half a grey level in the mean
    image, 2% in the spread around it, and a tenth of the spread of energies in their mean.
    """
    images, _ = load_data("fashion-mnist-sample", limit=100)
    noise = KeyedNoise(chain_keys(0, "precision", range(100), range(1))[0])
    energy = load_energy(name)
    ends = {}
    for precision in ("fp32", "bf16"):
        purifier = load_purifier(name, precision=precision)
        ends[precision] = purifier.purify(images, noise)
    exact, fast = ends["fp32"], ends["bf16"]
    assert (fast.mean() - exact.mean()).abs() < 0.5 / 255
    assert (fast - images).std() / (exact - images).std() == pytest.approx(1.0, abs=0.02)
    with torch.no_grad():
        difference = energy(fast * 2 - 1) - energy(exact * 2 - 1)
        spread = energy(exact * 2 - 1).std()
    assert difference.mean().abs() < 0.1 * spread


def test_the_smooth_energy_has_curvature_and_the_published_shape_has_none() -> None:
    x = load_data("fashion-mnist-sample", limit=2).images * 2 - 1
    largest = {}
    for name in ("fashion-mnist", "fashion-mnist-longrun"):
        energy = load_energy(name)
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        product = torch.zeros_like(x)
        if gradient.requires_grad:
            (found,) = torch.autograd.grad(gradient, x, torch.ones_like(x), allow_unused=True)
            product = product if found is None else found
        largest[name] = float(product.abs().max())
    assert largest["fashion-mnist-longrun"] == 0.0
    assert largest["fashion-mnist"] > 0.0


LOGITS = json.loads((Path(__file__).parent / "fixtures" / "logits.json").read_text("utf-8"))


@pytest.mark.parametrize("name", LOGITS)
def test_a_fixed_seed_gives_the_logits_that_it_always_gave(name: str) -> None:
    images, _ = load_data("fashion-mnist-sample", limit=4)
    chain = {"precision": "fp32"} if load_defense(name).purifier.chain_steps else {}
    defense = load_defense(name, replicates=2, seed=0, **chain)
    with torch.no_grad():
        found = defense(images)
    # Bit by bit on one machine; processors differ in the order of their sums.
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), rtol=1e-3, atol=1e-3)
