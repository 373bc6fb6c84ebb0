"""Competitors take turns, and memory is seen."""

from __future__ import annotations

from mmap import mmap

import pytest
import torch

from ebm_defense.runtime.timing import alternate, peak_memory

CPU = torch.device("cpu")
SIZE = 100_000_000


def test_competitors_take_turns_and_the_lower_quartile_counts():
    order, ticks = [], iter(range(10_000))
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = alternate(runs, 1e-3, CPU, clock=lambda: float(next(ticks)))
    assert order[:6] == ["a", "b"] * 3
    assert times == {"a": 1.0, "b": 1.0}


def test_peak_memory_sees_a_large_tensor():
    small = peak_memory(lambda: None, CPU)
    if small is None:
        pytest.skip("this system does not tell")
    assert peak_memory(lambda: mmap(-1, SIZE).write(b"x" * SIZE), CPU) > small + SIZE // 2
