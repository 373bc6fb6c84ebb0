"""The chain is what the paper says: against closed forms and an independent reference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.engine import energy_and_gradient, prepare
from ebm_defense.errors import UsageError
from ebm_defense.langevin import (
    LangevinSettings,
    State,
    Trace,
    langevin_step,
    moves,
    run_chain,
)
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.precision.names import resolve_precision
from ebm_defense.purifiers.langevin import LangevinPurifier

SHAPE = (1, 2, 2)


@dataclass(frozen=True)
class GivenNoise:
    """Noise that the test wrote down beforehand, `[steps, b, C, H, W]`."""

    z: torch.Tensor

    def normal(self, step, like):
        return self.z[step].to(like.dtype)

    def chunk(self, rows):
        return GivenNoise(self.z[:, rows])


class NoNoise:
    def normal(self, step, like):
        return torch.zeros_like(like)

    def chunk(self, rows):
        return self


def keyed(chains: int) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "langevin", range(chains), range(1))[0])


def curved(seed: int = 0, d: int = 4) -> torch.Tensor:
    """A positive definite, far from diagonal, curvature with eigenvalues from 0.2 to 1.4."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.linspace(0.2, 1.4, d, dtype=torch.float64)) @ q.T


def run(x, noise, energy, **options):
    chain = {k: options.pop(k) for k in ("steps", "step_size", "temperature") if k in options}
    return run_chain(x, noise, energy=energy, settings=LangevinSettings(**chain), **options)


# The tolerance of the two statistical tests. Over n independent chains that are exactly normal
# with mean m and covariance S, the sample mean has standard error sqrt(S_ii / n) and the sample
# covariance sqrt((S_ii S_jj + S_ij^2) / (n - 1)). A statistic beyond 5 standard errors has
# probability 6e-7, so a handful of them never fail by chance, while n = 20,000 shows an error of
# 4% of one standard deviation in the mean and of 5% in the variance.
CHAINS = 20_000
SIGMAS = 5.0


def assert_normal(x: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    n, variance = len(x), covariance.diag()
    z_mean = (x.mean(0) - mean) / (variance / n).sqrt()
    error = ((torch.outer(variance, variance) + covariance**2) / (n - 1)).sqrt()
    z_covariance = (x.T.cov() - covariance) / error
    assert float(z_mean.abs().max()) < SIGMAS
    assert float(z_covariance.abs().max()) < SIGMAS


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_diagonal_quadratic_chain_is_the_ar1_process(steps):
    mean = torch.tensor([0.3, -0.2, 0.0, 0.5], dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 2.0, 0.7], dtype=torch.float64)
    start = torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    eps, temperature = 0.3, 0.8
    energy = QuadraticEnergy(mean.view(SHAPE), 1 / spread**2)
    x = run(
        start.view(1, *SHAPE).expand(CHAINS, *SHAPE),
        keyed(CHAINS),
        energy,
        steps=steps,
        step_size=eps,
        temperature=temperature,
    )
    rho = 1 - eps**2 / (2 * temperature) / spread**2
    variance = eps**2 * (1 - rho ** (2 * steps)) / (1 - rho**2)
    assert_normal(x.flatten(1), mean + rho**steps * (start - mean), variance.diag())


def test_a_long_isotropic_chain_forgets_its_start_and_has_the_stationary_spread():
    s, eps, temperature = 0.5, 0.4, 1.0
    energy = QuadraticEnergy(torch.full(SHAPE, 0.25).double(), torch.full((4,), s**-2).double())
    start = torch.full((CHAINS, *SHAPE), 5.0, dtype=torch.float64)
    x = run(start, keyed(CHAINS), energy, steps=60, step_size=eps, temperature=temperature)
    # eps^2 / (1 - rho^2), which is T s^2 up to the discretisation's factor 1 / (1 - c / (2 s^2)).
    c = eps**2 / (2 * temperature)
    stationary = temperature * s**2 / (1 - c / (2 * s**2))
    assert_normal(x.flatten(1), torch.full((4,), 0.25).double(), stationary * torch.eye(4).double())


@pytest.mark.parametrize("steps", [3, 25])
def test_quadratic_chain_with_full_curvature_has_the_matrix_closed_form(steps):
    a, eps, temperature = curved(), 0.5, 0.5
    c = eps**2 / (2 * temperature)
    mean = torch.tensor([0.1, -0.4, 0.2, 0.0], dtype=torch.float64)
    start = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    x = run(
        start.view(1, *SHAPE).expand(CHAINS, *SHAPE),
        keyed(CHAINS),
        QuadraticEnergy(mean.view(SHAPE), a),
        steps=steps,
        step_size=eps,
        temperature=temperature,
    )
    m = torch.eye(4).double() - c * a
    powers = [torch.linalg.matrix_power(m, j) for j in range(steps)]
    covariance = eps**2 * sum(p @ p.T for p in powers)
    expected = mean + torch.linalg.matrix_power(m, steps) @ (start - mean)
    assert_normal(x.flatten(1), expected, covariance)


@pytest.mark.parametrize("steps", [1, 10, 200])
def test_the_drift_alone_is_the_matrix_power(steps):
    a, mean = curved(1), torch.randn(SHAPE, dtype=torch.float64, generator=seeded(1))
    start = torch.randn(3, *SHAPE, dtype=torch.float64, generator=seeded(2))
    chain = LangevinSettings(steps=steps, step_size=0.2, temperature=0.7)
    x = run_chain(start, NoNoise(), energy=QuadraticEnergy(mean, a), settings=chain)
    power = torch.linalg.matrix_power(torch.eye(4).double() - chain.drift * a, steps)
    expected = mean.flatten() + (start - mean).flatten(1) @ power.T
    torch.testing.assert_close(x.flatten(1), expected, rtol=0, atol=1e-12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(x: torch.Tensor) -> torch.Tensor:
    """An energy without any slope."""
    return (x * 0.0).flatten(1).sum(1)


def test_zero_gradient_and_vanishing_step_mean_no_motion():
    x = torch.rand(3, *SHAPE, generator=seeded(0))
    assert torch.equal(run(x, keyed(3), flat, steps=5, step_size=1e-30, temperature=1.0), x)


def test_a_vanishing_step_means_no_motion_whatever_the_energy():
    x = torch.rand(3, *SHAPE, generator=seeded(0)).double()
    energy = QuadraticEnergy(torch.zeros(SHAPE).double(), curved())
    assert torch.equal(run(x, keyed(3), energy, steps=5, step_size=1e-30, temperature=1.0), x)


def test_a_flat_energy_leaves_a_random_walk():
    x, noise = torch.zeros(3, *SHAPE, dtype=torch.float64), keyed(3)
    walked = run(x, noise, flat, steps=4, step_size=0.3, temperature=1e-3)
    expected = 0.3 * sum(noise.normal(k, x) for k in range(4))
    torch.testing.assert_close(walked, expected, rtol=0, atol=1e-14)


def test_the_mean_without_noise_is_a_fixed_point():
    mean = torch.rand(SHAPE, generator=seeded(0)).double()
    x = mean.expand(2, *SHAPE)
    assert torch.equal(run(x, NoNoise(), QuadraticEnergy(mean, curved()), steps=9), x)


def test_no_steps_are_the_identity():
    x = torch.rand(2, *SHAPE, generator=seeded(0))
    assert torch.equal(run(x, keyed(2), flat, steps=0), x)


def test_the_start_is_not_changed_in_place():
    x = torch.rand(2, *SHAPE, generator=seeded(0))
    copy = x.clone()
    run(x, keyed(2), flat, steps=3, step_size=0.1)
    assert torch.equal(x, copy)
    assert not x.requires_grad


def test_nothing_clamps_the_chain():
    x = torch.zeros(2, *SHAPE)
    far = run(x, GivenNoise(torch.full((50, 2, *SHAPE), 1.0)), flat, steps=50, step_size=0.5)
    torch.testing.assert_close(far, x + 25.0)


def test_the_default_chain_is_the_published_update():
    chain = LangevinSettings()
    assert (chain.steps, chain.step_size) == (1500, 0.01)
    assert math.isclose(chain.drift, 1.0)


def test_a_step_reports_energy_and_gradient_before_it():
    energy = QuadraticEnergy(torch.zeros(SHAPE).double(), torch.ones(4).double())
    x = torch.full((2, *SHAPE), 2.0, dtype=torch.float64)
    chain, gradient = LangevinSettings(step_size=0.1, temperature=0.5), prepare(energy, x, "fp64")
    (move,) = moves(chain.move, GivenNoise(torch.ones(7, *x.shape)), range(6, 7), x)
    state, info = langevin_step(State(x.clone(), 6), move, gradient, with_energy=True)
    assert state.step == 7
    torch.testing.assert_close(info.energy, torch.full((2,), 8.0).double())
    torch.testing.assert_close(info.gradient, x)
    torch.testing.assert_close(state.x, x - 0.1**2 / 2 / 0.5 * x + 0.1)
    assert langevin_step(state, move, gradient)[1].energy is None


@pytest.mark.parametrize("trace", [None, Trace()])
def test_every_step_of_a_chain_is_the_step(trace, monkeypatch):
    taken = []

    def counted(state, *arguments, **options):
        taken.append(state.step)
        return langevin_step(state, *arguments, **options)

    monkeypatch.setattr("ebm_defense.langevin.langevin_step", counted)
    run(torch.zeros(2, *SHAPE), keyed(2), flat, steps=3, first=5, trace=trace)
    assert taken == [5, 6, 7]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chain_is_the_same_in_every_grad_mode(mode, dtype):
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2)).to(dtype)
    start = torch.rand(2, 1, 8, 8, generator=seeded(0)).to(dtype)
    expected = run(start, keyed(2), energy, steps=3, step_size=0.1, temperature=1.0)
    with mode():
        inside = torch.rand(2, 1, 8, 8, generator=seeded(0)).to(dtype)
        x = run(inside, keyed(2), energy, steps=3, step_size=0.1, temperature=1.0)
    assert x.dtype == dtype
    assert torch.equal(x, expected)
    assert not x.requires_grad
    assert all(p.grad is None for p in energy.parameters())


def test_double_precision_is_kept_though_bf16_is_asked_for():
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2)).double()
    x = torch.rand(2, 1, 8, 8, generator=seeded(0)).double()
    runs = [run(x, keyed(2), energy, steps=3, precision=p) for p in ("fp32", "bf16", "fastest")]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_bf16_stays_near_fp32_and_keeps_the_state_in_fp32():
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    x = torch.rand(2, 1, 8, 8, generator=seeded(0))
    exact, rough = (run(x, keyed(2), energy, steps=5, precision=p) for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    drift = exact - run(x, keyed(2), flat, steps=5)
    assert float((rough - exact).norm()) < 0.2 * float(drift.norm())


@pytest.mark.parametrize(("native", "fastest"), [(True, "bf16"), (False, "fp32")])
def test_precisions_resolve_to_real_ones(native, fastest, monkeypatch):
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: native)
    cpu = torch.device("cpu")
    assert resolve_precision("fastest", cpu, torch.float32) == fastest
    assert resolve_precision("bf16", cpu, torch.float32) == "bf16"
    assert resolve_precision("bf16", cpu, torch.float64) == "fp64"
    for unknown in ("fp16", "auto"):
        with pytest.raises(UsageError, match=f"{unknown}.*fp32, tf32, bf16, fastest"):
            resolve_precision(unknown, cpu, torch.float32)


def test_no_chain_takes_bf16_that_was_neither_asked_for_nor_checked(monkeypatch):
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: True)
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    x = torch.rand(2, 1, 8, 8, generator=seeded(0))
    exact, plain, rough = (
        run(x, keyed(2), energy, steps=3, **asked)
        for asked in ({"precision": "fp32"}, {}, {"precision": "fastest"})
    )
    assert torch.equal(plain, exact)
    assert not torch.equal(rough, exact)


def test_trace_has_one_entry_a_step_with_the_right_values():
    energy = QuadraticEnergy(torch.zeros(SHAPE), torch.ones(4))
    x = torch.full((3, *SHAPE), 2.0)
    trace = Trace()
    end = run(
        x, NoNoise(), energy, steps=4, step_size=0.2, temperature=0.1, trace=trace,
        snapshots=(0, 2, 4, 99),
    )  # fmt: skip
    c = 0.2**2 / (2 * 0.1)
    norms = [4.0 * (1 - c) ** k for k in range(5)]
    expected = {
        "energy": [n**2 / 2 for n in norms[:4]],
        "gradient_norm": [c * n for n in norms[:4]],
        "displacement": [4.0 - n for n in norms[1:]],
    }
    for name, values in expected.items():
        found = torch.stack(getattr(trace, name))
        torch.testing.assert_close(found, torch.tensor(values)[:, None].expand(4, 3))
    assert sorted(trace.snapshots) == [0, 2, 4]
    assert torch.equal(trace.snapshots[0], x)
    assert torch.equal(trace.snapshots[4], end)
    torch.testing.assert_close(trace.snapshots[2], x * (1 - c) ** 2)


def test_tracing_does_not_change_the_chain():
    energy, x = QuadraticEnergy(torch.zeros(SHAPE), torch.ones(4)), torch.ones(2, *SHAPE)
    plain = run(x, keyed(2), energy, steps=5)
    traced = run(x, keyed(2), energy, steps=5, trace=Trace(), snapshots=range(6))
    assert torch.equal(plain, traced)


def test_trace_of_no_steps_holds_the_start_alone():
    trace, x = Trace(), torch.ones(2, *SHAPE)
    run(x, keyed(2), flat, steps=0, trace=trace, snapshots=(0,))
    assert (trace.energy, trace.gradient_norm, trace.displacement) == ([], [], [])
    assert torch.equal(trace.snapshots[0], x)


@pytest.mark.parametrize(
    "energy",
    [lambda x: x.sum(), lambda x: x.flatten(1).sum(1, keepdim=True), lambda x: x],
    ids=["one number", "a column", "a map"],
)
def test_an_energy_of_another_shape_is_refused(energy):
    with pytest.raises(UsageError, match="one number an image"):
        run(torch.ones(3, *SHAPE), keyed(3), energy, steps=1)


@pytest.mark.parametrize(
    "energy",
    [lambda x: torch.zeros(len(x)), lambda x: torch.zeros(len(x), requires_grad=True)],
    ids=["no graph", "a graph without x"],
)
def test_an_energy_that_ignores_its_images_is_refused(energy):
    with pytest.raises(UsageError):
        energy_and_gradient(energy, torch.ones(3, *SHAPE))


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"step_size": 0.0},
        {"step_size": -0.1},
        {"step_size": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
    ],
)
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(UsageError, match=next(iter(bad)) if "steps" not in bad else "steps"):
        LangevinSettings(**bad)


# The published update, from an implementation that shares no code with the package.


def reference_energy(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for key, stride, padding in (("f.0", 1, 1), ("f.2", 2, 1), ("f.4", 2, 1), ("f.6", 2, 1)):
        x = F.conv2d(x, weights[f"{key}.weight"], weights[f"{key}.bias"], stride, padding)
        x = F.leaky_relu(x, 0.05)
    return F.conv2d(x, weights["f.8.weight"], weights["f.8.bias"]).squeeze()


def reference_purify(weights, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    x = 2 * images - 1
    for noise in z:
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(reference_energy(weights, x).sum(), x)
        x = x - slope + 0.01 * noise
    return (x.detach() + 1) / 2


def given_weights(energy: ConvEnergy, gain: float) -> dict[str, torch.Tensor]:
    """Weights under which a step's drift is comparable to its noise."""
    generator = seeded(11)
    return {
        k: gain * torch.randn(v.shape, generator=generator, dtype=v.dtype) / v[0].numel() ** 0.5
        for k, v in energy.state_dict().items()
    }


def published_against_reference(shape, size, width, steps, dtype, gain):
    energy = ConvEnergy(ConvEnergySettings(image_size=size, width=width)).to(dtype)
    weights = given_weights(energy, gain)
    energy.load_state_dict(weights)
    z = torch.randn(steps, *shape, generator=seeded(12), dtype=dtype)
    images = torch.rand(shape, generator=seeded(13), dtype=dtype)
    ours = LangevinPurifier(energy, steps=steps, precision="fp32")(images, noise=GivenNoise(z))
    walk = images + 0.005 * z.sum(0)
    return ours, reference_purify(weights, images, z), walk


def test_published_update_matches_the_reference_over_1500_steps():
    # 1,500 steps of the full network in float64 cost 300 GFLOP, too much for a test: the same
    # layers at 16 x 16 pixels and width 8 take the same path. The next test has the full size.
    ours, reference, walk = published_against_reference(
        (1, 3, 16, 16), size=16, width=8, steps=1500, dtype=torch.float64, gain=0.7
    )
    assert float((reference - walk).abs().max()) > 0.5  # the energy did pull
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_network_matches_the_reference_over_10_steps(dtype):
    ours, reference, walk = published_against_reference(
        (2, 3, 32, 32), size=32, width=32, steps=10, dtype=dtype, gain=1.0
    )
    assert float((reference - walk).abs().max()) > 0.01
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-6)
