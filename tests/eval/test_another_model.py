"""A run folder goes on with the model that began it, and with no other."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense import LangevinPurifier, PurifiedClassifier, UsageError
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.eval import evaluate
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.merge import merge
from ebm_defense.eval.reverify import reverify
from ebm_defense.eval.running.workers import Workers
from ebm_defense.eval.storage.run_folder import BEHAVIOUR
from ebm_defense.purifiers import SteppedPurifier

SEEDS = itertools.count()
ATTACK = PGD(threat=ThreatModel(eps=0.1), steps=1, step_size=0.05, replicates=2)


def data(count=4):
    images = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return images, torch.arange(count) % 3


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(144, 3)).eval()


class Quantised(nn.Module):
    """A classifier of images rounded to so many levels, a plain attribute."""

    def __init__(self, levels=255):
        super().__init__()
        self.net, self.levels = network(), levels

    def forward(self, x):
        return self.net((x * self.levels).round() / self.levels)


class Shaken(nn.Module):
    """A classifier that draws from torch's own generator."""

    def __init__(self, std=0.1):
        super().__init__()
        self.net, self.std = network(), std

    def forward(self, x):
        return self.net(x + self.std * torch.randn_like(x))


class Blurred(SteppedPurifier):
    """A chain of blurs that no weight tells of."""

    chain_steps, stochastic = 120, False

    def __init__(self, share=0.3, from_step=0):
        super().__init__()
        self.__dict__["hidden"] = [share, from_step]

    def advance(self, x, noise, steps):
        share, first = self.hidden
        for step in steps:
            x = x.lerp(F.avg_pool2d(x, 3, 1, 1), share if step >= first else 0.0)
        return x


def function(weight):
    net = network()
    return lambda x: net(x) * weight


def after(last):
    net = network()
    return lambda x: last(net(x))


def before(first):
    net = network()
    return Wrap(lambda x: net(first(x)))


def with_a_generator(weight):
    """A classifier whose noise nobody else can set."""
    net, generator = network(), torch.Generator().manual_seed(next(SEEDS))
    return lambda x: weight * net(x + 0.05 * torch.randn(x.shape, generator=generator))


def blur(share):
    return lambda x: x.lerp(F.avg_pool2d(x, 3, 1, 1), share)


def energy(sign):
    return lambda x: sign * (x**2).flatten(1).sum(1)


def chain(of, **changed):
    settings = {"steps": 3, "step_size": 0.1, "temperature": 0.05, "precision": "fp32"}
    return PurifiedClassifier(network(), LangevinPurifier(of, **(settings | changed)), 2)


def behind(purifier, **changed):
    return PurifiedClassifier(network(), purifier, 2, **changed)


WAYS = {
    "weights": lambda b: network(int(b)),
    "a function's closure": lambda b: function(1.0 + b),
    "another function": lambda b: after(torch.tanh if b else torch.relu),
    "a module's attribute": lambda b: Quantised(3 if b else 255),
    "its own randomness": lambda b: Shaken(0.3 if b else 0.1),
    "a generator of its own": lambda b: with_a_generator(3.0 if b else 1.0),
    "a foreign purifier": lambda b: behind(blur(0.9 if b else 0.3)),
    "a chain that no settings tell of": lambda b: behind(Blurred(0.5 if b else 0.3)),
    "a chain's late steps": lambda b: behind(Blurred(0.3, 100 if b else 0)),
    "an energy's sign": lambda b: chain(energy(-1.0 if b else 1.0)),
    "the chain's settings": lambda b: chain(energy(1.0), steps=3 + b),
    "the average": lambda b: behind(blur(0.3), average="softmax" if b else "logits"),
    "the undefended classifier": lambda b: behind(blur(0.3), undefended=Wrap(function(1.0 + b))),
    "preprocessing": lambda b: before(lambda x: x - 0.02 * b),
}


class Wrap(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x):
        return self.of(x)


def run(model, out: Path | None, attacks=(ATTACK,)):
    images, labels = data()
    report = evaluate(model, images, labels, attacks=attacks, judge_replicates=2, out=out)
    return report.records


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_differs_is_refused(tmp_path, way):
    run(WAYS[way](False), tmp_path / "run")
    with pytest.raises(UsageError, match="holds a run of") as refused:
        run(WAYS[way](True), tmp_path / "run")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_model_made_again_goes_on(tmp_path, way):
    first = run(WAYS[way](False), tmp_path / "run")
    assert run(WAYS[way](False), tmp_path / "run").equals(first)


@pytest.mark.parametrize("way", ["a function's closure", "a foreign purifier"])
def test_a_verification_says_whether_the_run_s_own_model_judges(tmp_path, way):
    run(WAYS[way](False), tmp_path / "run")
    report = load_run(tmp_path / "run")
    assert reverify(report, WAYS[way](False)).settings["judge"] == "the same weights"
    other = reverify(report, WAYS[way](True))
    assert "answers differently" in other.settings["judge"]
    assert "answers differently" in other.to_text()


def test_parts_of_two_models_are_not_merged(tmp_path):
    images, labels = data(64)
    for part, weight in ((1, 1.0), (2, 3.0)):
        evaluate(function(weight), images, labels, attacks=[ATTACK], judge_replicates=2,
                 out=tmp_path / str(part), workers=Workers(part=part, parts=2))  # fmt: skip
    with pytest.raises(UsageError, match="holds a run of another model"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "whole")


def test_another_model_that_an_attack_was_made_on_is_refused(tmp_path):
    for weight, expected in ((1.0, None), (1.0, None), (2.0, UsageError)):
        attack = Transfer(attack=ATTACK, source=function(weight), replicates=2)
        if expected is None:
            run(network(), tmp_path / "run", [attack])
        else:
            with pytest.raises(expected, match="the model that transfer PGD-1"):
                run(network(), tmp_path / "run", [attack])


def test_the_same_model_on_another_number_of_threads_goes_on(tmp_path):
    threads = torch.get_num_threads()
    first = run(network(), tmp_path / "run")
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert run(network(), tmp_path / "run").equals(first)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rounding", [1e-6, 3e-5])
def test_a_model_that_rounds_otherwise_goes_on(tmp_path, rounding):
    first = run(after(lambda z: z), tmp_path / "run")
    found = run(after(lambda z: z * (1.0 + rounding)), tmp_path / "run")
    assert found.equals(first)


def test_nothing_is_used_again_where_the_answers_kept_are_damaged(tmp_path):
    run(network(), tmp_path / "run")
    (tmp_path / "run" / BEHAVIOUR).write_bytes(b"nonsense")
    with pytest.raises(UsageError, match=BEHAVIOUR):
        run(network(), tmp_path / "run")


def test_another_seed_is_refused(tmp_path):
    images, labels = data()
    for seed in (0, 0):
        evaluate(network(), images, labels, attacks=[ATTACK], judge_replicates=2, seed=seed,
                 out=tmp_path / "run")  # fmt: skip
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        evaluate(network(), images, labels, attacks=[ATTACK], judge_replicates=2, seed=7,
                 out=tmp_path / "run")  # fmt: skip
