"""The work of a step and of a product, and the bound on their time."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ebm_defense.attacks.gradients.smoothed import LentCurvature
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.engine.derivatives import hessian_product
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings, Work, product_work, step_work

TINY = ConvEnergySettings(channels=1, image_size=8, width=2)
MAPS = 8 * 8 * 2 + 4 * 4 * 4 + 2 * 2 * 8 + 1 * 1 * 16


class Counter(TorchDispatchMode):
    """Counts as FlopCounterMode does, which takes no gradient of a gradient."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


def image_of(settings: ConvEnergySettings) -> torch.Tensor:
    return torch.zeros((1, settings.channels, settings.image_size, settings.image_size))


def test_the_published_network_costs_what_is_known_of_it():
    # 26,054,656 products forward an image; twice that in FLOP, and as much for the gradient.
    assert step_work(LAYOUTS["cifar10"], "fp32").flops == 4 * 26_054_656


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_steps_flops_are_those_that_torch_counts(layout):
    settings = LAYOUTS[layout]
    energy = ConvEnergy(settings).requires_grad_(False)
    x = image_of(settings).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        energy(x).sum().backward()
    assert step_work(settings, "fp32").flops == counter.get_total_flops()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_products_flops_are_those_that_torch_counts(layout):
    settings = LAYOUTS[layout]
    energy = ConvEnergy(settings).requires_grad_(False)
    x = image_of(settings)
    bent = nullcontext() if settings.activation == "soft_lrelu" else LentCurvature(0.3)
    with Counter() as counter, bent:
        hessian_product(energy, x, torch.ones_like(x))
    assert product_work(settings, "fp32").flops == counter.flops


def test_bytes_are_those_of_the_maps():
    assert step_work(TINY, "bf16").bytes == 5 * 2 * MAPS + 12 * 64
    assert product_work(TINY, "fp32").bytes == 13 * 4 * MAPS + 12 * 64


def test_the_bound_is_the_slower_of_arithmetic_and_traffic():
    quick = Ceilings(precision="fp32", matmul=1.0, convolution=2.0, copy=1e12)
    slow = Ceilings(precision="fp32", matmul=1e15, convolution=1e15, copy=4.0)
    assert Work(6.0, 8.0).least_seconds(quick) == 3.0
    assert Work(6.0, 8.0).least_seconds(slow) == 2.0


def test_work_done_once_for_several_steps_is_shared_by_them():
    assert Work(8.0, 4.0).over(4) == Work(2.0, 1.0)
