"""A whole defense, its gradients and its packing on pretended GPUs: no device is mixed up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import ConvEnergy, ConvEnergySettings, LangevinPurifier, PurifiedClassifier
from ebm_defense.attacks import PGD, Full, Identity, Smoothed, ThreatModel
from ebm_defense.engine import cuda_graphs
from ebm_defense.eval import Protocol
from ebm_defense.eval.running import runner
from ebm_defense.noise import chain_keys
from ebm_defense.runtime import packing

GRADIENTS = {
    "identity": (Identity(), "leaky_relu"),
    "smoothed": (Smoothed(width=0.3, stride=2), "leaky_relu"),
    "full, all": (Full(store="all"), "soft_lrelu"),
    "full, checkpoints": (Full(store="checkpoints"), "soft_lrelu"),
}


def defense_of(activation="leaky_relu", steps=9, **options) -> PurifiedClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
        energy = ConvEnergy(shape).requires_grad_(False)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    chain = LangevinPurifier(energy, steps, 0.05, 0.0025, precision="fp32")
    return PurifiedClassifier(classifier, chain, replicates=2, seed=0, **options)


def images() -> torch.Tensor:
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _short(gpus, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "PAYS", 1)
    monkeypatch.setattr(cuda_graphs, "SEGMENT", 4)
    monkeypatch.setattr(cuda_graphs, "WARM_UP", 1)


@pytest.mark.parametrize("number", [0, 1])
def test_a_defense_on_any_gpu_gives_the_cpus_logits(number, gpus):
    there = f"cuda:{number}"
    expected = defense_of()(images())
    found = defense_of().to(there)(images().to(there))
    assert found.device == torch.device(there)
    assert gpus.captures == 2
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_through_chains_are_the_cpus_and_replay_to_the_last_bit(name, gpus):
    gradient, activation = GRADIENTS[name]
    keys = chain_keys(0, "gpu", range(3), range(2))
    pulled = {}
    for device in ("cpu", "cuda:0"):
        defense, x = defense_of(activation).to(device), images().to(device)
        cotangent = torch.ones(2, 3, 1, 8, 8).to(device)
        pulled[device] = gradient.purify(defense, x, keys).vjp(cotangent).cpu()
    torch.testing.assert_close(pulled["cuda:0"], pulled["cpu"], rtol=1e-4, atol=1e-5)
    assert gpus.captures == 2


def test_the_network_is_prepared_and_captured_once_for_all_states(gpus, monkeypatch):
    """Every state is kept, so the chain is run a step at a time."""
    made = []
    honest = cuda_graphs.Captured.__init__
    monkeypatch.setattr(
        cuda_graphs.Captured, "__init__", lambda self, *a: made.append(self) or honest(self, *a)
    )
    from ebm_defense import langevin

    prepared = []
    prepare = langevin.prepare
    monkeypatch.setattr(langevin, "prepare", lambda *a: prepared.append(1) or prepare(*a))
    defense = defense_of("soft_lrelu").to("cuda")
    keys = chain_keys(0, "gpu", range(3), range(2))
    Full(store="all").purify(defense, images().to("cuda"), keys)
    assert (len(made), len(prepared)) == (1, 1)


def test_chains_are_counted_with_the_classifier_and_the_product(gpus, monkeypatch):
    """As many fit as half of the memory holds of what all of them take together."""
    done = []
    defense = defense_of(steps=2, max_chains=None).to("cuda")
    monkeypatch.setattr(packing, "USUAL", 4)
    defense.packing = packing.Packing(None)
    honest = defense.classifier.forward
    defense.classifier.forward = lambda x: done.append(x.requires_grad) or honest(x)
    monkeypatch.setattr(
        type(defense.purifier), "probe_vjp", lambda self, x, noise: done.append("product")
    )
    gpus.peak, gpus.free = 6 * 1000, 100_000  # of 6 chains
    defense(images().to("cuda"))
    assert defense.max_chains == 32  # 50,000 / 1,000, as a power of two
    assert done[:2] == [True, "product"]


@pytest.mark.parametrize("activation", ["leaky_relu", "soft_lrelu"])
def test_the_probe_takes_the_memory_of_a_product(activation):
    defense = defense_of(activation)
    calls = []
    product = defense.purifier.prepared_vjp(images() * 2 - 1, "fp32")
    assert product is not None
    defense.purifier.prepared_vjp = lambda x, p: (
        lambda g, x, lent: calls.append(lent(x, 0.05).shape)
    )
    defense.purifier.probe_vjp(images(), None)
    assert calls == [images().shape]


def test_full_memory_frees_the_graphs_before_chains_are_halved(gpus, monkeypatch):
    defense = defense_of(max_chains=8).to("cuda")
    defense(images().to("cuda"))
    assert cuda_graphs.CAPTURES.kept
    honest, tries = defense.purifier.purify, []

    def purify(x, noise):
        tries.append((len(x), len(cuda_graphs.CAPTURES.kept)))
        if len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return honest(x, noise)

    monkeypatch.setattr(defense.purifier, "purify", purify)
    defense(images().to("cuda"))
    assert tries[0] == (6, 1)
    assert tries[1] == (4, 0)


def test_a_batch_fills_the_chains_but_no_more_is_lost_by_a_kill_than_minutes():
    def job(steps: int, replicates: int, images_there: torch.Tensor) -> runner.Job:
        attack = PGD(threat=ThreatModel(eps=0.1), steps=50, replicates=replicates)
        protocol = Protocol(name="mine", attacks=(attack,), judge_replicates=150)
        labels = torch.zeros(len(images_there), dtype=torch.long)
        defense = defense_of(steps=steps)
        return runner.Job(
            defense=defense, images=images_there, labels=labels, protocol=protocol, seed=0
        )

    there = images().to("cuda")
    assert runner.shards_at_once(job(50, 16, there)) == packing.READY // (16 * runner.SHARD) == 8
    published = job(1500, 15, there)
    count = runner.shards_at_once(published)
    lost = count * runner.SHARD * runner.planned_steps(published)
    assert count >= 2
    assert 0.7 * runner.STEPS_AT_RISK < lost <= runner.STEPS_AT_RISK
    assert runner.shards_at_once(job(1_000_000, 15, there)) == 1
