"""Distributions of points have the density that they say, and their draws have it too."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.data.points import POINTS, CircleMixture, Rings
from ebm_defense.learning.diagnosis.divergence import divergence, grid


@pytest.mark.parametrize("name", POINTS)
def test_a_density_holds_one_and_is_the_one_of_the_draws(name: str) -> None:
    truth = POINTS[name]()
    cells = grid(1.2, 600)
    weights = truth.log_density(cells).exp() * (2.4 / 600) ** 2
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-3)
    x = truth.draw(20_000, torch.Generator().manual_seed(0))
    assert x.shape == (20_000, 2, 1, 1)
    assert float(x.abs().max()) < 1.2
    # The mean of log p over draws is the integral of p·log p, within 4.5 standard errors.
    logs = truth.log_density(x.double())
    exact = float((weights * truth.log_density(cells)).sum())
    assert abs(float(logs.mean()) - exact) < 4.5 * float(logs.std()) / 20_000**0.5


def test_the_modes_and_the_rings_lie_where_the_paper_has_them() -> None:
    mixture, rings = CircleMixture(), Rings()
    assert mixture.centres().norm(dim=1) == pytest.approx([1.0] * 8)
    at = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    assert float(mixture.log_density(at / 2.0).diff()) < -10
    on = torch.tensor([[3.0, 0.0], [0.0, 3.5]]).view(2, 2, 1, 1)
    assert float(rings.log_density(on / 5.0).diff()) < -3


@pytest.mark.parametrize("spread", [0.1, 0.2])
def test_a_divergence_of_gaussians_is_the_closed_form(spread: float) -> None:
    """KL(N(0, s²) ‖ N(0, t²)) in the plane is 2·(log(t/s) + s²/(2t²) − ½)."""
    t = 0.15

    def log_density(x: torch.Tensor) -> torch.Tensor:
        square = x.flatten(1).square().sum(1) / spread**2
        return -0.5 * square - torch.log(2 * torch.tensor(torch.pi) * spread**2)

    found = divergence(
        lambda x: 0.5 * x.flatten(1).square().sum(1) / t**2 * 7.0, log_density, temperature=7.0
    )
    ratio = torch.tensor(t / spread)
    expected = 2 * float(ratio.log() + 0.5 / ratio**2 - 0.5)
    assert found.kl == pytest.approx(expected, abs=1e-3)
    assert found.mass == pytest.approx(1.0, abs=1e-6)
    assert float(found.log_density.exp().sum()) * (3.0 / 300) ** 2 == pytest.approx(1.0, abs=1e-6)


def test_an_energy_that_is_not_finite_is_infinitely_far() -> None:
    found = divergence(lambda x: x.flatten(1).sum(1) / 0.0, CircleMixture().log_density, 1.0)
    assert found.kl == float("inf")
