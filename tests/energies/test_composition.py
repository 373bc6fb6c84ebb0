"""Compositions are what the algebra of densities says, as functions and as what chains sample."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_defense import LangevinPurifier, QuadraticEnergy, UsageError
from ebm_defense.energies.composition import And, Not, Or
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys

T = 0.04


def gaussian(mean: tuple[float, float], curvature: tuple[float, float]) -> QuadraticEnergy:
    shape = (1, 1, 2)
    return QuadraticEnergy(
        torch.tensor(mean, dtype=torch.float64).view(shape),
        torch.tensor(curvature, dtype=torch.float64),
    )


FIRST, SECOND = gaussian((0.3, -0.2), (1.0, 2.0)), gaussian((-0.4, 0.1), (3.0, 0.5))


def points(count: int = 50) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 1, 2, generator=draw, dtype=torch.float64)


def samples(energy, start: float = 0.0, chains: int = 4000, steps: int = 400) -> torch.Tensor:
    """Where small-step chains are after many steps, `[chains, 2]`."""
    noise = KeyedNoise(chain_keys(0, "composition", range(chains), range(1))[0])
    x = torch.full((chains, 1, 1, 2), start, dtype=torch.float64)
    settings = LangevinSettings(steps=steps, step_size=0.05, temperature=T)
    return run_chain(x, noise, energy=energy, settings=settings).flatten(1)


def test_and_of_gaussians_is_the_gaussian_of_the_product() -> None:
    curvature = torch.tensor([1.0 + 2 * 3.0, 2.0 + 2 * 0.5], dtype=torch.float64)
    weighted = [1.0 * 0.3 + 2 * 3.0 * -0.4, 2.0 * -0.2 + 2 * 0.5 * 0.1]
    mean = torch.tensor(weighted, dtype=torch.float64) / curvature
    product = QuadraticEnergy(mean.view(1, 1, 2), curvature)
    x = points()
    difference = And(FIRST, SECOND, weights=(1, 2))(x) - product(x)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference))


def test_chains_on_and_sample_the_product() -> None:
    found = samples(And(FIRST, SECOND))
    # An unadjusted chain's variance is T/a/(1 − ε²a/(4T)).
    a = torch.tensor([4.0, 2.5], dtype=torch.float64)
    variance = T / a / (1 - 0.05**2 * a / (4 * T))
    mean = torch.tensor([(0.3 - 1.2) / 4, (-0.4 + 0.05) / 2.5], dtype=torch.float64)
    error = (variance / len(found)).sqrt()
    assert bool(((found.mean(0) - mean).abs() < 4.5 * error).all())
    spread = variance * math.sqrt(2 / len(found))
    assert bool(((found.var(0) - variance).abs() < 4.5 * spread).all())


def test_or_is_the_mixture_where_its_sharpness_is_one_over_the_temperature() -> None:
    x, s = points(), 1 / T
    mixture = Or(FIRST, SECOND, sharpness=s, weights=(1, 3))(x)
    density = torch.exp(-s * FIRST(x)) + 3 * torch.exp(-s * SECOND(x))
    torch.testing.assert_close(torch.exp(-s * mixture), density)


def test_a_sharp_or_is_the_least_energy() -> None:
    x = points()
    least = torch.minimum(FIRST(x), SECOND(x))
    torch.testing.assert_close(Or(FIRST, SECOND, sharpness=1e6)(x), least, atol=1e-5, rtol=0)


def test_chains_on_or_visit_each_part_as_often_as_its_weight_says() -> None:
    near, far = gaussian((-0.25, 0.0), (1.0, 1.0)), gaussian((0.25, 0.0), (1.0, 1.0))
    found = samples(Or(near, far, sharpness=1 / T, weights=(1, 3)), steps=600)
    # Mean of the mixture, 0.25·(3 − 1)/4, and its variance T + 0.25²·3/4 in the first pixel.
    error = math.sqrt((T + 0.25**2 * 0.75) / len(found))
    assert abs(float(found[:, 0].mean()) - 0.125) < 4.5 * error + 0.004  # the step's own bias


def test_not_of_gaussians_is_their_quotient() -> None:
    alpha = 0.2
    quotient = Not(FIRST, SECOND, alpha)
    a = torch.tensor([1.0 - 0.2 * 3.0, 2.0 - 0.2 * 0.5], dtype=torch.float64)
    left = [0.3 - 0.2 * 3.0 * -0.4, -0.4 - 0.2 * 0.5 * 0.1]
    mean = torch.tensor(left, dtype=torch.float64) / a
    x = points()
    difference = quotient(x) - QuadraticEnergy(mean.view(1, 1, 2), a)(x)
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-6, rtol=0)


def test_compositions_nest_and_purify() -> None:
    energy = And(Or(FIRST, SECOND), Not(FIRST, lambda x: x.flatten(1).sum(1)))
    purifier = LangevinPurifier(energy, steps=3, step_size=0.05, temperature=T)
    images = points(4).clamp(0, 1)
    assert purifier(images, torch.Generator().manual_seed(0)).shape == images.shape


def test_what_makes_no_composition_is_refused() -> None:
    with pytest.raises(UsageError, match="two energies"):
        And(FIRST)
    with pytest.raises(UsageError, match="weights above 0"):
        Or(FIRST, SECOND, weights=(1, 0))
    with pytest.raises(UsageError, match="sharpness"):
        Or(FIRST, SECOND, sharpness=0)
    with pytest.raises(UsageError, match="strength"):
        Not(FIRST, SECOND, -1.0)
    with pytest.raises(UsageError, match="one number an image"):
        And(FIRST, lambda x: x)(points(2))
