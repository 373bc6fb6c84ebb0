"""An energy of torchebm is an energy here, as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ebm_defense import LangevinPurifier, PurifiedClassifier
from ebm_defense.attacks import PGD
from ebm_defense.attacks.gradients.full import Full
from ebm_defense.engine import energy_and_gradient
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.learning.diagnosis.convergence import judge_convergence, long_runs
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer
from ebm_defense.noise import KeyedNoise, chain_keys

torchebm = pytest.importorskip("torchebm.core", reason="torchebm is not installed")
samplers = pytest.importorskip("torchebm.samplers", reason="torchebm is not installed")

SHAPE = (1, 4, 4)


class Bowl(torchebm.BaseModel):
    """A model of images with a weight, whose energy is a softened distance to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.full(SHAPE, 0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + (x - self.centre).square()).log().flatten(1).sum(1)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def keyed(count: int) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "torchebm", range(count), range(1))[0])


def test_its_gradient_is_its_own() -> None:
    energy, x = Bowl(), images() * 2 - 1
    value, slope = energy_and_gradient(energy, x)
    torch.testing.assert_close(value, energy(x).detach())
    torch.testing.assert_close(slope, energy.gradient(x))


@pytest.mark.parametrize("adjusted", [False, True])
def test_it_purifies_and_is_attacked_through_its_chain(adjusted: bool) -> None:
    purifier = LangevinPurifier(Bowl().requires_grad_(False), 4, 0.1, 0.05, adjusted=adjusted)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    defense = PurifiedClassifier(classifier, purifier, replicates=2, seed=0)
    assert purifier.gradients(images(1))[0] == "full"
    attack = PGD(steps=2, replicates=2, gradient=Full())
    attacked = attack(defense, images(), torch.tensor([0, 1, 2, 0]))
    assert attacked.isfinite().all()
    assert not torch.equal(attacked, images())


def test_it_learns() -> None:
    target = torch.full((40, *SHAPE), 0.8)
    chain = LangevinSettings(steps=3, step_size=0.1, temperature=0.1)
    recipe = EnergyRecipe(updates=60, batch=10, bank=20, langevin=chain, adam_lr=0.05)
    energy = Bowl()
    list(EnergyTrainer(energy, target, recipe).run())
    assert float((energy.centre.detach() - 0.6).abs().max()) < 0.2


def test_it_is_diagnosed() -> None:
    pytest.importorskip("arviz_stats", reason="the extra `diagnostics` is not installed")
    chain = LangevinSettings(steps=80, step_size=0.1, temperature=0.1)
    chains = long_runs(Bowl(), images(6) * 2 - 1, chain)
    assert judge_convergence(chains, learned_steps=4).verdict


def test_its_sampler_in_our_units_has_the_law_of_our_chain() -> None:
    """step_size is ε²/(2T) and noise_scale √T; both are the AR(1) process of the same numbers."""
    eps, temperature, steps, count, variance = 0.4, 0.5, 12, 20_000, 0.3
    model = torchebm.GaussianModel(mean=torch.full((2,), 0.25), cov=variance * torch.eye(2))
    rho = 1 - eps**2 / (2 * temperature) / variance
    mean = 0.25 + rho**steps * (1.0 - 0.25)
    spread = eps**2 * (1 - rho ** (2 * steps)) / (1 - rho**2)
    sampler = samplers.LangevinDynamics(
        model=model, step_size=eps**2 / (2 * temperature), noise_scale=math.sqrt(temperature)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = sampler.sample(x=torch.ones(count, 2), n_steps=steps)
    flat = nn.Sequential(nn.Flatten(), model)  # this model of theirs takes vectors
    chain = LangevinSettings(steps=steps, step_size=eps, temperature=temperature)
    ours = run_chain(torch.ones(count, 1, 1, 2), keyed(count), energy=flat, settings=chain)
    for x in (theirs, ours.flatten(1)):
        assert float((x.mean(0) - mean).abs().max()) < 4.5 * math.sqrt(spread / count)
        assert float((x.var(0) / spread - 1).abs().max()) < 4.5 * math.sqrt(2 / count)
