"""A chain by graphs is the chain by single steps, whatever was captured before."""

from __future__ import annotations

import logging

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.engine import cuda_graphs
from ebm_defense.engine.report import fell_back
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.noise import GeneratorNoise, KeyedNoise, chain_keys


def energy_of(seed=0, activation="leaky_relu", device="cuda:0") -> ConvEnergy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
        return ConvEnergy(shape).requires_grad_(False).to(device)


def keyed(chains: int, seed=0, device="cuda:0") -> KeyedNoise:
    return KeyedNoise(chain_keys(seed, "graphs", range(chains), range(1))[0].to(device))


def states(chains=3, seed=1, device="cuda:0") -> torch.Tensor:
    draw = torch.randn(chains, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return draw.to(device)


def chain(x, noise, energy, steps=9, first=0, **options):
    settings = LangevinSettings(steps=steps, step_size=0.05, temperature=0.0025)
    return run_chain(x, noise, energy=energy, settings=settings, first=first, **options)


@pytest.fixture(autouse=True)
def pays_at_once(gpus, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PAYS", 1)
    monkeypatch.setattr(cuda_graphs, "SEGMENT", 4)  # short chains of two long graphs and a step
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 1)
    fell_back.cache_clear()


@pytest.fixture
def singly(monkeypatch):
    """Run a chain by single steps."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr("ebm_defense.langevin.run_graphed", lambda *_: 0)
            return chain(*arguments, **options)

    return run


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("activation", "steps"), [("leaky_relu", 1), ("soft_lrelu", 9)])
def test_a_graphed_chain_is_the_single_steps_to_the_last_bit(
    steps, activation, precision, gpus, singly
):
    energy = energy_of(activation=activation)
    options = {"steps": steps, "precision": precision, "first": 5}
    found = chain(states(), keyed(3), energy, **options)
    assert gpus.captures == 2
    assert gpus.replays > 2
    assert torch.equal(found, singly(states(), keyed(3), energy, **options))
    traced = chain(states(), keyed(3), energy, trace=Trace(), **options)
    assert torch.equal(found, traced)


def test_one_capture_serves_other_states_noise_steps_and_weights(gpus, singly):
    cases = [
        (states(), keyed(3), energy_of(), 0),
        (states(seed=2), keyed(3), energy_of(), 0),
        (states(), keyed(3, seed=1), energy_of(), 0),
        (states(), keyed(3), energy_of(), 1400),
        (states(), keyed(3), energy_of(seed=7), 0),
    ]
    ends = [chain(x, noise, energy, first=first) for x, noise, energy, first in cases]
    assert gpus.captures == 2
    for end, (x, noise, energy, first) in zip(ends, cases, strict=True):
        assert torch.equal(end, singly(x, noise, energy, first=first))


def test_weights_are_taken_as_they_are_at_each_chain_and_never_written(gpus, singly):
    first, second = energy_of(), energy_of(seed=7)
    before = [p.clone() for p in first.parameters()]
    chain(states(), keyed(3), first)
    chain(states(), keyed(3), second)
    assert all(map(torch.equal, before, first.parameters()))
    for p in first.parameters():
        p.data.mul_(1.5)  # which no version counter sees
    found = chain(states(), keyed(3), first)
    assert gpus.captures == 2
    assert torch.equal(found, singly(states(), keyed(3), first))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": lambda: states(4), "noise": lambda: keyed(4)},
        {"precision": lambda: "bf16"},
        {"energy": lambda: energy_of(activation="soft_lrelu")},
    ],
)
def test_what_kernels_depend_on_is_captured_apart(changed, gpus, singly):
    usual = {"x": states, "noise": lambda: keyed(3), "energy": energy_of}
    chain(**{name: make() for name, make in usual.items()})
    other = {name: make() for name, make in (usual | changed).items()}
    found = chain(**other)
    assert gpus.captures == 4
    assert torch.equal(found, singly(**other))


def test_another_slope_step_size_or_temperature_is_captured_apart(gpus, singly):
    energy = energy_of()
    chain(states(), keyed(3), energy)
    energy.f[3].negative_slope = 0.3
    assert torch.equal(chain(states(), keyed(3), energy), singly(states(), keyed(3), energy))
    assert gpus.captures == 4
    for size, temperature in ((0.06, 0.0025), (0.05, 0.01)):
        settings = LangevinSettings(steps=4, step_size=size, temperature=temperature)
        run_chain(states(), keyed(3), energy=energy, settings=settings)
    assert gpus.captures == 8


@pytest.mark.parametrize("number", [0, 1])
def test_each_gpu_captures_on_a_stream_of_its_own(number, gpus, singly):
    device = f"cuda:{number}"
    chain(states(), keyed(3), energy_of())  # the process's first capture, on the first GPU
    x, noise, energy = states(device=device), keyed(3, device=device), energy_of(device=device)
    found = chain(x, noise, energy)
    assert found.device == torch.device(device)
    assert not torch.equal(found, x)
    assert torch.equal(found, singly(x, noise, energy))
    assert gpus.captures == 2 * (number + 1)
    assert gpus.current == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(mode, gpus, singly):
    expected = singly(states(), keyed(3), energy_of())
    with mode():
        first = chain(states(), keyed(3), energy_of())
    with torch.inference_mode():
        second = chain(states(), keyed(3), energy_of())
    third = chain(states(), keyed(3), energy_of())
    assert gpus.captures == 2
    assert all(torch.equal(found, expected) for found in (first, second, third))


def test_an_energy_that_nobody_knows_is_never_captured(gpus, singly):
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1  # of which a graph would see the first value alone
            return (0.1 * self.calls * x.square()).flatten(1).sum(1)

    found = chain(states(), keyed(3), Counting())
    assert gpus.captures == 0
    assert torch.equal(found, singly(states(), keyed(3), Counting()))
    quadratic = QuadraticEnergy(torch.zeros(1, 8, 8), torch.ones(64)).to("cuda:0")
    chain(states(), keyed(3), quadratic)
    assert gpus.captures == 0


def test_short_chains_are_captured_once_it_pays(gpus, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PAYS", 10)
    for captures in (0, 0, 2, 2):
        chain(states(), keyed(3), energy_of(), steps=4)
        assert gpus.captures == captures


def test_as_many_captures_are_kept_as_said_the_latest_used(gpus, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "KEPT", 2)
    for count, captures in ((1, 2), (2, 4), (1, 4), (3, 6), (1, 6), (2, 8)):
        chain(states(count), keyed(count), energy_of())
        assert gpus.captures == captures
    assert len(cuda_graphs.CAPTURES.kept) == 2


@pytest.fixture
def broken(monkeypatch):
    """Make captures fail in a way; return the shapes of those that were tried."""
    tried = []

    def of(kind: str):
        def fail(self, count):
            tried.append(len(self.x))
            if kind == "raises":
                raise RuntimeError("operation not permitted when stream is capturing")
            if kind == "no memory":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 3 GiB.")
            graph = honest(self, count)
            if kind == "nothing recorded":
                graph.reset()
            else:  # another kernel chosen within the capture: the last bit differs
                graph.operations.append(
                    (torch.ops.aten.mul_.Scalar, (self.x, 1 + 2e-7), {}, self.x)
                )
            return graph

        honest = cuda_graphs.Captured._graph
        monkeypatch.setattr(cuda_graphs.Captured, "_graph", fail)
        return tried

    return of


@pytest.mark.parametrize("kind", ["raises", "no memory", "nothing recorded", "rounds otherwise"])
def test_losing_a_capture_costs_nothing_but_speed(kind, broken, gpus, singly, caplog):
    tried = broken(kind)
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        ends = [chain(states(), keyed(3), energy_of()) for _ in range(3)]
    expected = singly(states(), keyed(3), energy_of())
    assert all(torch.equal(end, expected) for end in ends)
    assert tried.count(3) <= 2  # the two graphs of one capture: what failed is not tried again
    assert len([r for r in caplog.records if "CUDA graphs cannot run" in r.getMessage()]) == 1
    chain(states(4), keyed(4), energy_of())
    # Full memory says nothing of a smaller batch; any other failure ends captures on that device.
    assert (4 in tried) == (kind == "no memory")
    assert (torch.device("cuda:0") in cuda_graphs.CAPTURES.closed) == (kind != "no memory")


def test_full_memory_takes_the_graphs_first(gpus):
    chain(states(), keyed(3), energy_of())
    cuda_graphs.free_graphs()
    assert not cuda_graphs.CAPTURES.kept
    chain(states(), keyed(3), energy_of())
    assert gpus.captures == 4


def test_buffers_in_use_by_another_thread_are_left_alone(gpus, singly):
    expected = singly(states(), keyed(3), energy_of())
    with cuda_graphs.CAPTURES.lock:
        assert torch.equal(chain(states(), keyed(3), energy_of()), expected)
    assert gpus.captures == 0


def test_captures_that_share_memory_wait_for_one_another(gpus):
    chain(states(3), keyed(3), energy_of())
    chain(states(4), keyed(4), energy_of())
    last = gpus.recorded
    gpus.waited.clear()
    chain(states(3), keyed(3), energy_of())  # perhaps on another stream
    assert gpus.waited == [last]


def test_layouts_do_not_matter(gpus, singly):
    wide = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to("cuda")
    shape = ConvEnergySettings(channels=2, image_size=8, width=2)
    energy = ConvEnergy(shape).requires_grad_(False).to("cuda")
    last = wide.contiguous(memory_format=torch.channels_last)
    found = chain(last, keyed(3), energy)
    assert found.is_contiguous()
    assert torch.equal(found, singly(last, keyed(3), energy))
    assert torch.equal(found, chain(wide, keyed(3), energy))
    assert gpus.captures == 2


def test_a_generators_noise_is_drawn_where_the_chain_is(gpus):
    def run(seed: int, steps=12):
        noise = GeneratorNoise(torch.Generator().manual_seed(seed))
        flat = QuadraticEnergy(torch.zeros(1, 8, 8), torch.full((64,), 1.0)).to("cuda:0")
        settings = LangevinSettings(steps=steps, step_size=0.5, temperature=1.0)
        return run_chain(
            torch.zeros(200, 1, 8, 8, device="cuda"), noise, energy=flat, settings=settings
        )

    first = run(0)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))
    # x ← (1 − ε²/2)·x + ε·z from 0 has the variance ε²·Σ (1 − ε²/2)^2k.
    expected = 0.25 * sum(0.875 ** (2 * k) for k in range(12))
    assert first.cpu().var().item() == pytest.approx(expected, rel=5 * (2 / 12_800) ** 0.5)
