"""The hand-written gradient is autograd's, and autograd takes what it does not."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ebm_defense.energies.conv import ACTIVATIONS, ConvEnergy, ConvEnergySettings, SoftLeakyReLU
from ebm_defense.engine import ENGINES, Engine, choose_engine, prepare
from ebm_defense.engine.autograd import energy_and_gradient
from ebm_defense.engine.convolutional import ConvGradient, SoftActivation
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.noise import GeneratorNoise, KeyedNoise, chain_keys

# Channels, size, width: the smallest, odd sizes, and the layouts that ship.
SHAPES = [(1, 8, 2), (2, 9, 3), (3, 15, 2), (1, 28, 16), (3, 32, 8)]


def energy_of(channels=1, size=8, width=2, activation="leaky_relu") -> ConvEnergy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvEnergy(
            ConvEnergySettings(
                channels=channels, image_size=size, width=width, activation=activation
            )
        )


def images_of(energy: ConvEnergy, count=3, dtype=torch.float32) -> torch.Tensor:
    s = energy.settings
    shape = (count, s.channels, s.image_size, s.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def keyed(chains: int) -> KeyedNoise:
    return KeyedNoise(chain_keys(0, "engine", range(chains), range(1))[0])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_energy_and_gradient_are_autograds(activation, shape, dtype, tolerance):
    energy = energy_of(*shape, activation).to(dtype)
    x = images_of(energy, dtype=dtype)
    value, slope = energy_and_gradient(energy, x)
    ours = ConvGradient(energy, dtype)
    found, again = ours.with_energy(x)
    assert relative(again, slope) < tolerance
    assert relative(found, value) < tolerance
    assert torch.equal(ours(x), again)
    assert ours(x).dtype == dtype


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_rounds_about_as_autograd_in_bf16_does(activation):
    energy = energy_of(1, 28, 16, activation)
    x = images_of(energy, 8)
    exact = energy_and_gradient(energy.double(), x.double())[1]
    energy.float()
    autograd = relative(energy_and_gradient(energy, x, "bf16")[1], exact)
    ours = relative(ConvGradient(energy, torch.bfloat16)(x), exact)
    assert 0 < ours < 1.5 * autograd


def test_a_smooth_bend_rounds_its_slope_once():
    layer = SoftLeakyReLU(slope=0.05, width=0.01)
    z = torch.tensor([-3.0, -1.0, -0.1, 0.0, 0.1, 3.0], dtype=torch.bfloat16)
    exact = z.double().requires_grad_()
    (slope,) = torch.autograd.grad(layer(exact).sum(), exact)
    found = SoftActivation(layer, z).forward(z)[1]
    # 2^-9 for the slope and 2^-9 for z/r, whose error the mean with 1 makes no smaller.
    assert torch.equal(found[[0, 1, -1]], slope.bfloat16()[[0, 1, -1]])
    assert bool(((found.double() - slope).abs() <= 2**-9 * (slope + 1.0)).all())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["convolutional", "autograd"])
def test_a_chain_is_the_same_in_any_batch_piece_and_trace(engine, precision):
    energy = energy_of(1, 12, 3)
    x, noise = images_of(energy, 5), keyed(5)
    options = {"energy": energy, "precision": precision, "engine": engine}
    chain = LangevinSettings(steps=6, step_size=0.1, temperature=0.01)
    whole = run_chain(x, noise, settings=chain, **options)
    traced = run_chain(x, noise, settings=chain, trace=Trace(), **options)
    assert torch.equal(traced, whole)
    half = LangevinSettings(steps=3, step_size=0.1, temperature=0.01)
    first = run_chain(x, noise, settings=half, **options)
    assert torch.equal(run_chain(first, noise, settings=half, first=3, **options), whole)
    alone = run_chain(x[1:2], KeyedNoise(noise.keys[1:2]), settings=chain, **options)
    torch.testing.assert_close(
        alone, whole[1:2], rtol=0, atol=1e-5 if precision == "fp32" else 0.02
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_engines_run_the_same_chain(activation):
    energy = energy_of(1, 16, 4, activation)
    x = images_of(energy, 4)
    chain = LangevinSettings(steps=20, step_size=0.05, temperature=0.0025)
    ends = [
        run_chain(x, keyed(4), energy=energy, settings=chain, precision="fp32", engine=engine)
        for engine in ("convolutional", "autograd")
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neither_the_callers_grad_mode_nor_autocast_matters(mode, precision):
    energy = energy_of(1, 12, 3)
    chain = LangevinSettings(steps=3)
    expected = run_chain(
        images_of(energy), keyed(3), energy=energy, settings=chain, precision=precision
    )
    with mode(), torch.autocast("cpu", torch.bfloat16):
        x = run_chain(
            images_of(energy), keyed(3), energy=energy, settings=chain, precision=precision
        )
    assert torch.equal(x, expected)


def test_weights_are_taken_as_they_are_at_each_chain():
    energy = energy_of()
    x = images_of(energy)
    before = prepare(energy, x, "fp32")(x)
    for p in energy.parameters():
        p.data.mul_(1.5)  # which no version counter sees
    after = prepare(energy, x, "fp32")(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, energy_and_gradient(energy, x)[1])


def test_conv_energies_are_run_by_hand_and_the_rest_by_autograd():
    energy = energy_of()
    x = images_of(energy)
    assert choose_engine(energy, x, "fp32") == "convolutional"
    assert choose_engine(energy, x[:1], "bf16") == "convolutional"
    others = [
        (energy, x[:0], "fp32"),  # no images
        (energy.double(), x.double(), "fp64"),  # the referee
        (energy_of(), torch.zeros(2, 1, 9, 9), "fp32"),  # images of another size
        (energy_of(), x.double(), "fp32"),  # images of another dtype
        (_Sub(energy_of().settings), x, "fp32"),  # a network whose forward is its own
        (lambda x: x.flatten(1).sum(1), x, "fp32"),
        (_altered(nn.Tanh()), x, "fp32"),
    ]
    for other, images, precision in others:
        assert choose_engine(other, images, precision) == "autograd"


class _Sub(ConvEnergy):
    def forward(self, x):
        return 2.0 * super().forward(x)


def _altered(activation: nn.Module) -> ConvEnergy:
    energy = energy_of()
    energy.f[3] = activation
    return energy


def test_hooks_are_run():
    energy = energy_of()
    x = images_of(energy)
    slope = energy_and_gradient(energy, x)[1]
    energy.register_forward_hook(lambda module, given, value: 3.0 * value)
    torch.testing.assert_close(prepare(energy, x, "fp32")(x), 3.0 * slope)


def test_an_engine_that_fails_is_replaced_by_autograd_and_said_once(monkeypatch, caplog):
    def fail(energy, x, precision):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(ENGINES, "convolutional", Engine(lambda *_: True, fail))
    energy = energy_of()
    x = images_of(energy)
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        slopes = [prepare(energy, x, "fp32")(x) for _ in range(3)]
    assert torch.equal(slopes[0], energy_and_gradient(energy, x)[1])
    assert [r.getMessage() for r in caplog.records if "no compiler here" in r.getMessage()][
        1:
    ] == []
    assert "no compiler here" in caplog.text


def test_an_engine_asked_for_by_name_must_support_the_energy():
    x = torch.zeros(2, 1, 8, 8)
    with pytest.raises(UsageError, match="does not support"):
        prepare(lambda x: x.flatten(1).sum(1), x, "fp32", "convolutional")
    with pytest.raises(UsageError, match="choose one of auto, convolutional, layered"):
        prepare(energy_of(), x, "fp32", "warp")


def test_empty_batches_take_steps_too():
    energy = energy_of()
    for noise in (keyed(0), GeneratorNoise(torch.Generator())):
        x = run_chain(
            images_of(energy)[:0], noise, energy=energy, settings=LangevinSettings(steps=3)
        )
        assert x.shape == (0, 1, 8, 8)


def test_the_chains_memory_does_not_grow_with_its_length(monkeypatch):
    monkeypatch.setattr("ebm_defense.noise._AHEAD", 4096)  # noise of two steps at a time
    energy = energy_of(1, 16, 4)
    x = images_of(energy, 6)

    def highest(steps: int) -> int:
        from torch.profiler import ProfilerActivity, profile

        chain = LangevinSettings(steps=steps)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
            run_chain(x, keyed(6), energy=energy, settings=chain, precision="fp32")
        held = most = 0
        for event in run.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
        return most

    highest(2)
    assert highest(40) < 1.01 * highest(10)
