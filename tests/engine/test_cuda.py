"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.engine.cuda_graphs import run_graphed
from ebm_defense.langevin import LangevinSettings, Move, run_chain
from ebm_defense.noise import KeyedNoise, chain_keys

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def keyed(chains: int, device: str) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "cuda", range(chains), range(1))[0].to(device))


def test_on_a_cpu_no_step_is_graphed():
    x = torch.zeros(2, 1, 8, 8)
    move = Move(drift=1.0, step_size=0.1)
    assert run_graphed(x, keyed(2, "cpu"), range(100), lambda x: x, move) == 0
    assert not x.any()


@gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
def test_a_graphed_chain_is_the_stepwise_one(activation, precision, monkeypatch):
    shape = ConvEnergySettings(channels=1, image_size=28, width=16, activation=activation)
    energy = channels_last(ConvEnergy(shape)).cuda()
    x = torch.randn(8, 1, 28, 28, device="cuda")
    chain = LangevinSettings(steps=47, step_size=0.05, temperature=0.0025)
    options = {"energy": energy, "settings": chain, "precision": precision}
    graphed = run_chain(x, keyed(8, "cuda"), **options)
    monkeypatch.setattr("ebm_defense.langevin.run_graphed", lambda *_: 0)
    torch.testing.assert_close(graphed, run_chain(x, keyed(8, "cuda"), **options))


@gpu
def test_a_gpu_chain_is_the_cpus():
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=28, width=16))
    x = torch.randn(4, 1, 28, 28)
    chain = LangevinSettings(steps=41, step_size=0.05, temperature=0.0025)
    here = run_chain(x, keyed(4, "cpu"), energy=energy, settings=chain, precision="fp32")
    there = run_chain(
        x.cuda(), keyed(4, "cuda"), energy=energy.cuda(), settings=chain, precision="fp32"
    )
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)
