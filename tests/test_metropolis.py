"""The adjusted chain has its law exactly, whatever the step size."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.engine.derivatives import hessian_product
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.learning.defenses.chain import LearnedChain
from ebm_defense.noise import GeneratorNoise, KeyedNoise, chain_keys
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.registry import caption

SHAPE = (1, 2, 2)
CHAINS = 20_000
SIGMAS = 4.5
"""Standard errors; of 14 statistics one is further off by chance with a probability of 1e-4."""


def keyed(chains: int) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "metropolis", range(chains), range(1))[0])


def small_energy() -> ConvEnergy:
    torch.manual_seed(0)
    energy = ConvEnergy(
        ConvEnergySettings(channels=1, image_size=8, width=2, activation="softplus")
    )
    energy = energy.double().requires_grad_(False)
    for weight in energy.parameters():
        weight.mul_(3.0)  # untrained, its curvature would be too small for a step to be refused
    return energy


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def errors_of(x: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Return how far off means and covariances of normal samples are, in standard errors."""
    n, variance = len(x), covariance.diag()
    of_mean = (x.mean(0) - mean) / (variance / n).sqrt()
    spread = ((torch.outer(variance, variance) + covariance**2) / (n - 1)).sqrt()
    of_covariance = (x.T.cov() - covariance) / spread
    return torch.cat([of_mean, of_covariance[tuple(torch.tril_indices(len(mean), len(mean)))]])


def test_a_large_step_leaves_the_adjusted_chain_exact_and_biases_the_other() -> None:
    """Under U = xᵀAx/2 the law is N(μ, T·A⁻¹); an unadjusted chain's is AR(1)'s, wider."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    eigenvalues = torch.tensor([0.5, 0.8, 1.1, 1.4], dtype=torch.float64)
    a, temperature, eps = q @ eigenvalues.diag() @ q.T, 0.8, 1.1
    mean = torch.tensor([0.3, -0.2, 0.0, 0.5], dtype=torch.float64)
    exact = temperature * torch.linalg.inv(a)
    rho = 1 - eps**2 / (2 * temperature) * eigenvalues
    biased = q @ (eps**2 / (1 - rho**2)).diag() @ q.T
    ends = {}
    for adjusted in (True, False):
        chain = LangevinSettings(
            steps=60, step_size=eps, temperature=temperature, adjusted=adjusted
        )
        start = torch.full((CHAINS, *SHAPE), 1.0, dtype=torch.float64)
        energy = QuadraticEnergy(mean.view(SHAPE), a)
        ends[adjusted] = run_chain(start, keyed(CHAINS), energy=energy, settings=chain).flatten(1)
    assert float(errors_of(ends[True], mean, exact).abs().max()) < SIGMAS
    assert float(errors_of(ends[False], mean, biased).abs().max()) < SIGMAS
    # Else the step would be too small to tell the two apart.
    assert float(errors_of(ends[False], mean, exact).abs().max()) > 2 * SIGMAS
    assert float(errors_of(ends[True], mean, biased).abs().max()) > 2 * SIGMAS


def test_a_small_step_is_the_unadjusted_one_and_almost_never_refused() -> None:
    energy, x = QuadraticEnergy(torch.zeros(SHAPE).double(), torch.ones(4).double()), images(9)
    x, trace = x[:, :, :2, :2], Trace()
    chain = LangevinSettings(steps=20, step_size=1e-3, temperature=1.0, adjusted=True)
    end = run_chain(x, keyed(9), energy=energy, settings=chain, trace=trace)
    assert trace.acceptance is not None
    assert trace.acceptance > 0.999
    assert 0.5e-3 * math.sqrt(20) < float((end - x).std()) < 2e-3 * math.sqrt(20)


def test_a_refused_chain_stays_and_a_proposal_without_energy_is_refused() -> None:
    def walled(x: torch.Tensor) -> torch.Tensor:
        outside = x.abs().flatten(1).amax(1) > 1
        return torch.where(outside, torch.nan, 0.0) + 0.0 * x.flatten(1).sum(1)

    trace, x = Trace(), torch.zeros(200, *SHAPE)
    chain = LangevinSettings(steps=30, step_size=0.4, temperature=1.0, adjusted=True)
    end = run_chain(x, keyed(200), energy=walled, settings=chain, trace=trace, snapshots=range(31))
    assert float(end.abs().max()) <= 1.0
    assert 0.1 < (trace.acceptance or 0.0) < 0.9
    for step, moved in enumerate(trace.accepted):
        changed = (trace.snapshots[step + 1] != trace.snapshots[step]).flatten(1).any(1)
        assert torch.equal(changed, moved.bool())
    # Inside, the wall's law is uniform: each pixel's variance is 1/3.
    assert abs(float(end.var()) - 1 / 3) < 4.5 * math.sqrt(4 / 45 / 800)


def test_the_chain_is_the_same_in_blocks_in_other_batches_and_traced() -> None:
    purifier = LangevinPurifier(small_energy(), 6, 0.2, 0.02, adjusted=True)
    x, noise = images(5), keyed(5)
    whole, trace = purifier.purify(x, noise), Trace()
    blocks = purifier.states(purifier.enter(x), noise, [range(2), range(2, 6)])
    assert torch.equal(purifier.leave(blocks[-1]), whole)
    assert torch.equal(purifier.purify(x, noise, trace=trace), whole)
    assert 0.05 < (trace.acceptance or 0.0) < 0.95
    alone = torch.cat(
        [purifier.purify(x[i : i + 1], noise.chunk(slice(i, i + 1))) for i in range(5)]
    )
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-12)


def test_a_generator_drives_it_too() -> None:
    chain = LangevinSettings(steps=3, step_size=0.4, temperature=0.02, adjusted=True)
    ends = [
        run_chain(
            images(2), GeneratorNoise(torch.Generator().manual_seed(seed)), energy=small_energy(),
            settings=chain,
        )
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_its_gradient_is_that_of_the_accepted_steps() -> None:
    energy = small_energy()
    purifier = LangevinPurifier(energy, 4, 0.2, 0.02, adjusted=True)
    x, noise, trace = purifier.enter(images(6)), keyed(6), Trace()
    end = purifier.purify(images(6), noise, trace=trace, snapshots=range(5))
    g = torch.randn(end.shape, generator=torch.Generator().manual_seed(2)).double()
    found, expected = g, g
    for k in range(3, -1, -1):
        x, moved = trace.snapshots[k], trace.accepted[k].double().view(-1, 1, 1, 1)
        found = purifier.vjp_step(found, x, noise, k)
        drift = purifier.settings.drift
        expected = expected - moved * drift * hessian_product(energy, x, expected)
    assert 0 < float(torch.stack(trace.accepted).mean()) < 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    assert purifier.gradients(images(1)) == ("full", "bpda")


def test_rounded_energies_are_refused() -> None:
    chain = LangevinSettings(steps=1, adjusted=True)
    x = torch.zeros(1, *SHAPE)
    energy = QuadraticEnergy(torch.zeros(SHAPE), torch.ones(4))
    with pytest.raises(UsageError, match=r"compares energies.*precision fp32"):
        run_chain(x, keyed(1), energy=energy, settings=chain, precision="bf16")


def test_what_is_learned_takes_every_step() -> None:
    with pytest.raises(UsageError, match="not adjusted"):
        LearnedChain(small_energy(), LangevinSettings(adjusted=True))


def test_it_is_said_where_it_is_unusual() -> None:
    records = [
        LangevinPurifier(small_energy(), 2, adjusted=adjusted).record(images(1))
        for adjusted in (True, False)
    ]
    assert caption(records[0]).endswith("Metropolis-adjusted")
    assert "Metropolis" not in caption(records[1])
    assert "adjusted" not in records[1]
