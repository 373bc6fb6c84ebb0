"""Short chains sample, interpolate and reconstruct as a generator does."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.learning.shortrun import ShortRun, _pulled_back, _states
from ebm_defense.noise import KeyedNoise

SHAPE = (1, 8, 8)
CHAIN = LangevinSettings(steps=5, step_size=0.1, temperature=0.02)


def energy(activation: str = "silu") -> ConvEnergy:
    torch.manual_seed(0)
    shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
    made = ConvEnergy(shape).requires_grad_(False)
    for weight in made.parameters():
        weight.mul_(3.0)  # untrained, it would hardly move a chain
    return made


def model(**options: object) -> ShortRun:
    return ShortRun(**({"energy": energy(), "settings": CHAIN, "shape": SHAPE} | options))


def test_samples_are_the_chains_of_their_numbers() -> None:
    made = model()
    samples = made.sample(6)
    assert torch.equal(made.sample(2, first=4), samples[4:])
    assert not torch.equal(model(seed=1).sample(6), samples)
    starts = made.starts(6)
    assert float(starts.abs().max()) <= 1.0
    assert abs(float(starts.var()) - 1 / 3) < 0.05
    chain = run_chain(starts, made.noise(6), energy=made.energy, settings=CHAIN)
    assert torch.equal(chain, samples)


@pytest.mark.parametrize("adjusted", [False, True])
def test_the_gradient_through_all_steps_is_torchs_own(adjusted: bool) -> None:
    settings = LangevinSettings(steps=4, step_size=0.1, temperature=0.02, adjusted=adjusted)
    made = model(energy=energy().double(), settings=settings)
    z, noise, chain = made.starts(3).double(), made.noise(3), made._chain()
    states = _states(chain, z, noise)
    cotangent = torch.randn(states[-1].shape, generator=torch.Generator().manual_seed(1)).double()
    found = _pulled_back(chain, states, noise, cotangent)
    x = z.clone().requires_grad_()
    y = x
    for step in range(4):
        (slope,) = torch.autograd.grad(made.energy(y).sum(), y, create_graph=True)
        moved = (states[step + 1] != states[step]).flatten(1).any(1).double().view(-1, 1, 1, 1)
        y = y - moved * settings.drift * slope
        y = y + (states[step + 1] - y).detach()  # the noise
    (expected,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_the_model_made_is_reconstructed() -> None:
    made = model()
    target = made(made.starts(3, first=50))
    found = made.reconstruct(target, updates=60, learning_rate=0.1)
    assert found.errors.shape == (61, 3)
    assert bool((found.errors[-1] < 0.05 * found.errors[0]).all())
    assert float(found.starts.abs().max()) <= 1.0
    assert torch.equal(made(found.starts), found.images)
    apart = (found.images - target).square().flatten(1).mean(1)
    torch.testing.assert_close(found.errors[-1], apart)


def test_under_a_quadratic_energy_the_start_is_the_one_of_the_closed_form() -> None:
    """M(z) = (1 − c)^K·z + what noise adds, so that the start is known."""
    chain = LangevinSettings(steps=3, step_size=0.2, temperature=0.1)
    bowl = QuadraticEnergy(torch.zeros(SHAPE), torch.ones(64))
    made = ShortRun(energy=bowl, settings=chain, shape=SHAPE)
    start = made.starts(2, first=9) * 0.9
    found = made.reconstruct(made(start), updates=150, learning_rate=0.1)
    torch.testing.assert_close(found.starts, start, rtol=0, atol=0.02)


def test_an_interpolation_ends_at_its_ends_and_keeps_the_starts_spread() -> None:
    made, noise = model(), KeyedNoise(torch.arange(4))
    first, second = made.starts(4), made.starts(4, first=4)
    line = made.interpolate(first, second, 5, noise)
    assert line.shape == (5, 4, *SHAPE)
    torch.testing.assert_close(line[0], made(first, noise), rtol=0, atol=1e-5)
    torch.testing.assert_close(line[-1], made(second, noise), rtol=0, atol=1e-5)
    middle = (first + second) / 2**0.5
    torch.testing.assert_close(line[2], made(middle, noise), rtol=0, atol=1e-5)


def test_settings_out_of_range_are_refused() -> None:
    made = model()
    with pytest.raises(UsageError, match="2 images or more"):
        made.interpolate(made.starts(1), made.starts(1), 1)
    with pytest.raises(UsageError, match="1 update or more"):
        made.reconstruct(made.starts(1), updates=0)
