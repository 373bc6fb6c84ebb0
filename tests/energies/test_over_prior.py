"""An energy over a prior is their weighted sum, of which only the energy learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier
from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.over_prior import OverPrior, over
from ebm_defense.energies.registry import ENERGIES
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings
from ebm_defense.engine import choose_engine, energy_and_gradient, prepare
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import save_tensors
from ebm_defense.storage.folders import save_defense
from ebm_defense.storage.state_dicts import about
from ebm_defense.storage.weights import load_energy, network_of


def parts() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ResidualEnergySettings(channels=1, image_size=16, width=3, activation="silu")
        return ConvEnergy(ConvEnergySettings(channels=1, image_size=16, width=3)), ResidualEnergy(
            shape
        )


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def both(pull: float = 0.7) -> OverPrior:
    return over(*parts(), weight=3.0, pull=pull)


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_it_is_the_weighted_sum(pull):
    energy, prior = parts()
    x = images()
    expected = energy(x) + 3.0 * prior(x) + 0.5 * pull * x.square().flatten(1).sum(1)
    torch.testing.assert_close(both(pull)(x), expected)
    alone = over(energy, None, weight=1.0, pull=0.7)
    torch.testing.assert_close(alone(x), energy(x) + 0.35 * x.square().flatten(1).sum(1))


@pytest.mark.parametrize("prior", [True, False])
def test_its_engine_is_autograd_s_gradient(prior):
    u = both() if prior else over(parts()[0], None, weight=1.0, pull=0.7)
    x = images()
    assert choose_engine(u, x, "fp32") == "layered"
    fast = prepare(u, x, "fp32")
    value, slope = energy_and_gradient(u, x)
    torch.testing.assert_close(fast(x), slope, rtol=1e-4, atol=1e-6)
    for found, expected in zip(fast.with_energy(x), (value, slope), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_energy_learns():
    u = both()
    before = {k: v.clone() for k, v in u.state_dict().items()}
    chain = LangevinSettings(steps=2, step_size=0.05, temperature=1e-2)
    recipe = EnergyRecipe(updates=2, batch=4, bank=8, langevin=chain, limit=1e6)
    list(EnergyTrainer(u, (images(8) + 1) / 2, recipe).run())
    moved = {k for k, v in u.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(name.startswith("energy.") for name in moved)
    assert not any(p.requires_grad for p in u.requires_grad_(True).prior.parameters())


def test_it_is_kept_in_files_and_folders(tmp_path):
    u, x = both(), images()
    save_tensors(tmp_path / "energy.safetensors", u.state_dict(), about(u, data="digits"))
    torch.testing.assert_close(network_of(tmp_path / "energy.safetensors", ENERGIES)(x), u(x))
    shape = WideResNetSettings(channels=1, classes=10, depth=10, widen=1)
    classifier = normalized(WideResNet(shape), 0.5, 0.5)
    defense = PurifiedClassifier(classifier, LangevinPurifier(u, 2, 0.05, 1e-2))
    save_defense(defense, tmp_path / "defense", description="", data="digits")
    torch.testing.assert_close(load_energy(tmp_path / "defense")(x), u(x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": 0.0, "pull": 0.0}, "weight must be above 0"),
        ({"weight": 1.0, "pull": -1.0}, "pull 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        over(*parts(), **options)


def test_what_is_no_energy_over_a_prior_is_refused(tmp_path):
    with pytest.raises(UsageError, match="needs a prior energy, or a pull"):
        over(parts()[0], None, weight=1.0, pull=0.0)
    with pytest.raises(UsageError, match="not a Linear"):
        over(parts()[0], nn.Linear(2, 2), weight=1.0, pull=0.0)
    save_tensors(tmp_path / "bare.safetensors", parts()[0].state_dict())
    with pytest.raises(UsageError, match="does not say that it holds one of ConvEnergy"):
        network_of(tmp_path / "bare.safetensors", ENERGIES)
