"""The benchmark's formulas, its published loop, and that competitors take turns."""

from __future__ import annotations

from mmap import mmap

import pytest
import torch

from ebm_defense.energies import ConvEnergy, ConvEnergySettings
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.throughput import (
    LAYOUTS,
    Ceilings,
    Protocol,
    alternate,
    measure,
    peak_memory,
    published_chain,
    step_bound,
    step_bytes,
    step_flops,
)

CPU = torch.device("cpu")
SIZE = 100_000_000
TINY = ConvEnergySettings(channels=1, image_size=8, width=2)


def test_the_published_network_costs_what_is_known_of_it():
    # 26,054,656 products forward an image; twice that in FLOP, and as much for the gradient.
    assert step_flops(LAYOUTS["cifar10"]) == 4 * 26_054_656


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flops_are_those_that_torch_counts(layout):
    from torch.utils.flop_counter import FlopCounterMode

    settings = LAYOUTS[layout]
    energy = ConvEnergy(settings).requires_grad_(False)
    shape = (1, settings.channels, settings.image_size, settings.image_size)
    x = torch.zeros(shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        energy(x).sum().backward()
    assert step_flops(settings) == counter.get_total_flops()


def test_bytes_are_those_of_the_maps():
    maps = 8 * 8 * 2 + 4 * 4 * 4 + 2 * 2 * 8 + 1 * 1 * 16
    assert step_bytes(TINY, 2) == 5 * 2 * maps + 12 * 64


def test_the_bound_is_the_slower_of_arithmetic_and_traffic():
    quick = Ceilings(precision="fp32", matmul=1.0, convolution=2.0, copy=1e12)
    slow = Ceilings(precision="fp32", matmul=1e15, convolution=1e15, copy=3.0)
    assert step_bound(TINY, quick) == pytest.approx(2.0 / step_flops(TINY))
    assert step_bound(TINY, slow) == pytest.approx(3.0 / step_bytes(TINY, 4))


def test_the_published_loop_is_the_package_s_chain_without_its_noise(monkeypatch):
    monkeypatch.setattr("ebm_defense.throughput.PUBLISHED_EPS", 0.0)
    energy = ConvEnergy(TINY)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Silence:
        def normal(self, step, like):
            return torch.zeros_like(like)

    chain = LangevinSettings(steps=4)
    ours = run_chain(x, Silence(), energy=energy, settings=chain, precision="fp32")
    torch.testing.assert_close(published_chain(energy, x, 4), ours)


def test_competitors_take_turns_and_the_lower_quartile_counts():
    order, ticks = [], iter(range(10_000))
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = alternate(runs, 1e-3, CPU, clock=lambda: float(next(ticks)))
    assert order[:6] == ["a", "b"] * 3
    assert times == {"a": 1.0, "b": 1.0}


def test_a_cell_holds_the_published_loop_and_ours(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "tiny", TINY)
    limits = [
        Ceilings(precision=p, matmul=1e9, convolution=1e9, copy=1e9) for p in ("fp32", "bf16")
    ]
    cells = measure("tiny", 3, limits, 0.01, CPU)
    assert [c.name for c in cells] == ["published", "fp32", "bf16"]
    assert cells[0].ratio == 1.0
    assert all(c.steps_per_second > 0 and c.batch == 3 for c in cells)
    for cell, limit in zip(cells[1:], limits, strict=True):
        assert cell.roofline == pytest.approx(cell.steps_per_second / step_bound(TINY, limit))


def test_peak_memory_sees_a_large_tensor():
    small = peak_memory(lambda: None, CPU)
    if small is None:
        pytest.skip("this system does not tell")
    assert peak_memory(lambda: mmap(-1, SIZE).write(b"x" * SIZE), CPU) > small + SIZE // 2


def test_the_published_protocol_costs_what_is_known_of_it():
    plain = Protocol(verifications=0.0)
    assert plain.chain_steps(1, drop_broken=False) == 52 * 15 * 1500
    assert Protocol().chain_steps(2, drop_broken=False) == 2 * (52 * 15 * 1500 + 2 * 225_000)
    dropped = Protocol(verifications=0.0, robust=0.5, broken_after=0.5)
    assert dropped.chain_steps(1, drop_broken=True) == 0.75 * 52 * 15 * 1500
