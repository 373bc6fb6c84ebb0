"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import LangevinPurifier, PurifiedClassifier
from ebm_defense.attacks import Full, Smoothed
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.engine import cuda_graphs, energy_and_gradient, prepare, triton_kernels, trust
from ebm_defense.engine.convolutional import ConvGradient
from ebm_defense.engine.cuda_graphs import run_graphed
from ebm_defense.langevin import LangevinSettings, Move, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.precision.devices import self_check

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
CHAIN = LangevinSettings(steps=47, step_size=0.05, temperature=0.0025)


def keyed(chains: int, device: str) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "cuda", range(chains), range(1))[0].to(device))


def energy_of(activation="leaky_relu", width=16) -> ConvEnergy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = ConvEnergySettings(channels=1, image_size=28, width=width, activation=activation)
        return channels_last(ConvEnergy(shape).requires_grad_(False))


def test_on_a_cpu_no_step_is_graphed():
    x = torch.zeros(2, 1, 8, 8)
    move = Move(drift=1.0, step_size=0.1)
    assert run_graphed(x, keyed(2, "cpu"), range(100), lambda x: x, move) == 0
    assert not x.any()


@gpu
def test_a_gpu_passes_every_check_of_its_own():
    found = self_check(torch.device("cuda", 0))
    assert found.failed == [], found
    assert {"gradient in fp32", "Hessian product", "graphs", "chains' moments"} <= set(found.errors)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
def test_a_graphed_chain_is_the_stepwise_one_to_the_last_bit(activation, precision, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CAPTURES", cuda_graphs.Captures())
    monkeypatch.setattr(cuda_graphs, "PAYS", 1)
    energy = energy_of(activation).cuda()
    x = torch.randn(8, 1, 28, 28, device="cuda")
    options = {"energy": energy, "settings": CHAIN, "precision": precision}
    graphed = run_chain(x, keyed(8, "cuda"), **options)
    # Else two chains by single steps would be compared, and nothing shown.
    assert len(cuda_graphs.CAPTURES.kept) == 1
    assert not cuda_graphs.CAPTURES.closed
    monkeypatch.setattr("ebm_defense.langevin.run_graphed", lambda *_: 0)
    assert torch.equal(graphed, run_chain(x, keyed(8, "cuda"), **options))


@gpu
def test_a_gpu_runs_the_fast_ways(monkeypatch):
    device = torch.device("cuda", 0)
    x = torch.zeros(2, 1, 28, 28, device=device)
    assert isinstance(prepare(energy_of().to(device), x, "fp32"), ConvGradient)
    if triton_kernels.triton is not None:
        assert triton_kernels.works(device)
    assert all(trust.trusted(device, way) for way in ("graphs", "Hessian product"))


@gpu
@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
def test_a_gpu_gradient_is_float64s_and_a_chain_the_cpus(activation):
    energy = energy_of(activation)
    x = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    exact = energy_and_gradient(energy_of(activation).double(), x.double())[1]
    here = run_chain(x, keyed(8, "cpu"), energy=energy, settings=CHAIN, precision="fp32")
    energy = energy.cuda()
    found = prepare(energy, x.cuda(), "fp32")(x.cuda()).cpu().double()
    assert float((found - exact).norm() / exact.norm()) < 1e-5
    there = run_chain(x.cuda(), keyed(8, "cuda"), energy=energy, settings=CHAIN, precision="fp32")
    # Rounding grows along the chain; noise of another step or key would be 0.05 a pixel off.
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-3)


@gpu
@pytest.mark.parametrize("gradient", [Full(store="all"), Full(store="checkpoints"), Smoothed()])
def test_long_gradients_through_chains_replay_to_the_last_bit(gradient):
    activation = "leaky_relu" if isinstance(gradient, Smoothed) else "soft_lrelu"
    chain = LangevinPurifier(energy_of(activation).cuda(), 300, 0.05, 0.0025, precision="bf16")
    defense = PurifiedClassifier(nn.Flatten(), chain, max_chains=300).cuda()
    images = torch.rand(250, 1, 28, 28, device="cuda")
    keys = chain_keys(0, "long", range(250), range(1))
    pulled = gradient.purify(defense, images, keys).vjp(images[None])  # refuses a mismatch
    assert bool(pulled.isfinite().all())
