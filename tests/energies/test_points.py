"""The toy network is the published one, and takes the place of any energy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from ebm_defense.data.points import CircleMixture
from ebm_defense.energies.points import PointEnergy, PointEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.diagnosis.divergence import divergence
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer


def test_it_is_the_published_network_of_1x1_convolutions() -> None:
    torch.manual_seed(0)
    energy = PointEnergy(PointEnergySettings(reach=3.0))
    shapes = [tuple(m.weight.shape) for m in energy.f if isinstance(m, nn.Conv2d)]
    sizes = [2, 32, 64, 64, 64, 1]
    assert shapes == [(b, a, 1, 1) for a, b in pairwise(sizes)]
    x = torch.rand(5, 2, 1, 1)
    torch.testing.assert_close(energy(x), energy.f(3.0 * x).flatten())


def test_it_may_see_the_distance_from_the_origin() -> None:
    energy, x = PointEnergy(PointEnergySettings(radial=True)), torch.zeros(1, 2, 1, 1)
    assert energy.f[0].in_channels == 3
    x.requires_grad_()
    energy(x).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("bad", [{"image_size": 2}, {"reach": 0.0}, {"width": 0}])
def test_settings_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="an energy of points needs"):
        PointEnergySettings(**bad)


def learned(steps: int, step_size: float, updates: int, **options: object) -> float:
    """Learn the mixture of eight Gaussians and return KL(truth ‖ learned)."""
    truth = CircleMixture()
    points = truth.draw(5000, torch.Generator().manual_seed(0))
    temperature = 0.5 * 0.125**2
    chain = LangevinSettings(
        steps=steps, step_size=step_size / truth.reach, temperature=temperature, adjusted=True
    )
    recipe = EnergyRecipe(
        updates=updates, langevin=chain, data_noise=0.0, fresh="noise", rejuvenation=0.0,
        average=0.95, limit=1e6, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    energy = PointEnergy(PointEnergySettings(reach=3.0))
    trainer = EnergyTrainer(energy, ((points + 1) / 2).clamp(0, 1), recipe)
    list(trainer.run())
    return divergence(trainer.averaged.module, truth.log_density, temperature, cells=150).kl


def test_chains_that_forget_their_start_find_the_density_and_others_do_not() -> None:
    """One seed on its way: benchmarks/toys.py learns on to a divergence below 0.1, ten seeds."""
    options = {"batch": 200, "bank": 200, "adam_lr": 2e-3, "final_lr": 1e-5}
    assert learned(20, 0.25, 90, start="persistent", **options) < 0.8
    assert learned(20, 0.01, 30, start="noise", **options) > 2.0
