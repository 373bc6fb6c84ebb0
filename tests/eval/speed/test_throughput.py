"""The published loop, and the cells of chains and of the gradients through them."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.engine.cuda_graphs import PAYS, SEGMENT
from ebm_defense.engine.product import ConvProduct
from ebm_defense.eval.speed import throughput
from ebm_defense.eval.speed.roofline import LAYOUTS, Ceilings, product_work, step_work
from ebm_defense.eval.speed.throughput import measure, published_chain
from ebm_defense.langevin import LangevinSettings, run_chain

CPU = torch.device("cpu")
TINY = {
    name: ConvEnergySettings(channels=1, image_size=8, width=2, activation=name)
    for name in ("leaky_relu", "soft_lrelu")
}
LIMITS = [
    Ceilings(precision="fp32", matmul=1e9, convolution=1e9, copy=1e9),
    Ceilings(precision="bf16", matmul=2e9, convolution=3e9, copy=1e9),
]
GRADIENTS = {"leaky_relu": ("smoothed", 4), "soft_lrelu": ("full", 1)}


@pytest.fixture(params=TINY)
def activation(request, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "tiny", TINY[request.param])
    monkeypatch.setattr(throughput, "LONGEST", 5)
    monkeypatch.setattr(throughput, "SHORTEST", 5)
    return request.param


def test_the_published_loop_is_the_package_s_chain_without_its_noise(monkeypatch):
    monkeypatch.setattr(throughput, "PUBLISHED_EPS", 0.0)
    energy = ConvEnergy(TINY["leaky_relu"])
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    class Silence:
        def normal(self, step, like):
            return torch.zeros_like(like)

    chain = LangevinSettings(steps=4)
    ours = run_chain(x, Silence(), energy=energy, settings=chain, precision="fp32")
    torch.testing.assert_close(published_chain(energy, x, 4), ours)


def test_a_cell_holds_the_published_loop_ours_and_the_gradient_through_ours(activation):
    cells = {c.name: c for c in measure("tiny", 3, LIMITS, 0.01, CPU)}
    gradient = GRADIENTS[activation][0]
    names = [f"{gradient}, fp32 chain", f"{gradient}, bf16 chain"]
    assert list(cells) == ["published", "fp32", names[0], "bf16", names[1]]
    assert cells["published"].ratio == 1.0
    assert all(c.steps_per_second > 0 and c.batch == 3 for c in cells.values())
    for precision, name in zip(("fp32", "bf16"), names, strict=True):
        chain, back = cells[precision], cells[name]
        assert chain.over_forward is None
        assert back.over_forward == pytest.approx(chain.steps_per_second / back.steps_per_second)
        assert back.over_forward > 1.0


def test_shares_of_the_roofline_count_the_chain_in_its_precision_and_products_in_fp32(activation):
    cells = {c.name: c for c in measure("tiny", 3, LIMITS, 0.01, CPU)}
    gradient, stride = GRADIENTS[activation]
    product = product_work(TINY[activation], "fp32")
    for limit in LIMITS:
        step = step_work(TINY[activation], limit.precision)
        chain, back = cells[limit.precision], cells[f"{gradient}, {limit.precision} chain"]
        least = step.least_seconds(limit)
        assert chain.roofline == pytest.approx(chain.steps_per_second * least)
        least += product.least_seconds(LIMITS[0]) / stride
        assert back.roofline == pytest.approx(back.steps_per_second * least)
        arithmetic = step.flops / limit.convolution + product.flops / stride / 1e9
        assert back.convolution == pytest.approx(back.steps_per_second * arithmetic)


def test_the_gradient_takes_a_product_a_stride_in_fp32(activation, monkeypatch):
    products = []
    honest = ConvProduct.__call__

    def counted(product, x, vector, lent=None):
        products.append((product.dtype, len(x)))
        return honest(product, x, vector, lent)

    start = throughput.start_of(TINY[activation], 3, 5, CPU)
    found = throughput.competitors(TINY[activation], start, LIMITS)
    name, stride = GRADIENTS[activation]
    monkeypatch.setattr(ConvProduct, "__call__", counted)
    pulled = found[f"{name}, bf16 chain"].run()
    assert pulled.shape == (1, 3, 1, 8, 8)
    assert products == [(torch.float32, 3)] * -(-start.chain.steps // stride)


def test_on_a_gpu_like_is_compared_with_like(monkeypatch):
    """torch's own loop rounds to TF32 there; beside it stands one that does not."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        throughput, "resolve_precision", lambda p, *_: {"fastest": "bf16"}.get(p, p)
    )
    assert throughput.precisions_here(gpu) == ["fp32", "tf32", "bf16"]
    start = throughput.start_of(TINY["leaky_relu"], 3, 5, CPU)
    limit = LIMITS[0]
    fast = Ceilings(precision="tf32", matmul=8e9, convolution=8e9, copy=1e9)
    found = throughput.competitors(TINY["leaky_relu"], start, [limit, fast])
    assert list(found)[:2] == [throughput.PUBLISHED, throughput.STRICT]
    work = step_work(TINY["leaky_relu"], "fp32")
    assert found[throughput.PUBLISHED].convolution_seconds == pytest.approx(work.flops / 8e9)
    assert found[throughput.STRICT].convolution_seconds == pytest.approx(work.flops / 1e9)


def test_chains_on_a_gpu_are_long_enough_for_its_graphs():
    gpu = torch.device("cuda")
    steps = {batch: throughput.steps_of(batch, gpu) for batch in (1, 150, 2400, 10_000)}
    assert steps[1] == steps[150] == PAYS
    assert all(s >= 2 * SEGMENT for s in steps.values())
    assert throughput.steps_of(150, CPU) == 13


def test_the_published_loop_may_run_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    start = throughput.start_of(TINY["leaky_relu"], 3, 2, CPU)
    found = throughput.competitors(TINY["leaky_relu"], start, LIMITS, compiled=True)
    assert found[throughput.COMPILED].run().shape == (3, 1, 8, 8)
    assert len(compiled) == 1
