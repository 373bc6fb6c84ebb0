"""What an evaluation will cost is told of any model, before it is begun."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import LangevinPurifier, PurifiedClassifier, Purifier
from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.eval import Protocol
from ebm_defense.eval.running.job import Job
from ebm_defense.eval.running.runner import planned_steps
from ebm_defense.eval.speed.forecast import forecast
from ebm_defense.purifiers.baselines import GaussianNoise


class Foreign(Purifier):
    """A chain of one's own, which cannot be cut into steps; it counts the images it has seen."""

    chain_steps = 4

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def purify(self, images, noise):
        self.seen.append(len(images))
        return images + 0.01 * noise.normal(0, images)


class Blind(nn.Flatten):
    """A classifier that gives no gradient."""

    def forward(self, x):
        return super().forward(x).detach()


@pytest.fixture(autouse=True)
def briefly_timed(monkeypatch):
    monkeypatch.setattr("ebm_defense.eval.speed.forecast.TIMED_SECONDS", 0.01)


def job(classifier, purifier, replicates=2):
    attack = PGD(threat=ThreatModel(eps=0.1), steps=3, step_size=0.1, replicates=replicates)
    protocol = Protocol(name="mine", attacks=(attack,), judge_replicates=5)
    images = torch.rand((6, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = images.flatten(1).argmax(1)
    defense = PurifiedClassifier(classifier, purifier)
    return Job(defense=defense, images=images, labels=labels, protocol=protocol, seed=0)


@pytest.mark.parametrize("classifier", [nn.Flatten(), Blind()])
def test_of_a_chain_and_a_classifier_that_nobody_knows(classifier):
    purifier = Foreign()
    work = job(classifier, purifier)
    said = forecast(work)
    assert f"chain-steps: {6 * planned_steps(work):,} if" in said
    assert "classifier included" in said
    # A look of 400 chains fills them with shards of 32 images of 2 replicates: six shards, 384.
    assert purifier.seen[-1] == 384
    assert "384 chains" in said


class Watched(nn.Module):
    """An energy that remembers how many images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100_000))
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(len(x))
        return x.square().flatten(1).sum(1)


def test_a_forecast_grows_from_one_chain_and_stops_when_it_can_tell(monkeypatch):
    """Of an energy that takes 50 ms an image, a whole look of 384 chains would take minutes."""
    energy = Watched()

    def clocked(run, device, clock):
        before = sum(energy.seen)
        run()
        # An engine may prepare for 10 ms, once a chain.
        return 0.05 * (sum(energy.seen) - before) + 0.01

    monkeypatch.setattr("ebm_defense.eval.speed.forecast.timed", clocked)
    monkeypatch.setattr("ebm_defense.eval.speed.forecast.ENOUGH", 0.15)
    work = job(nn.Flatten(), LangevinPurifier(energy, steps=1000))
    said = forecast(work)
    assert max(energy.seen) == 4
    assert f"chain-steps: {6 * planned_steps(work):,} if" in said
    assert "on 4 of 384 chains" in said
    assert "at 20 chain-steps a second" in said


def test_nothing_is_checked_for_a_forecast(monkeypatch):
    """The check of a faster precision takes as long as it takes, and belongs to the run itself."""
    monkeypatch.setattr("ebm_defense.precision.chains.check", lambda *_: pytest.fail("a check"))
    monkeypatch.setattr("ebm_defense.eval.speed.forecast.ENOUGH", 0.0)
    forecast(job(nn.Flatten(), LangevinPurifier(Watched(), steps=1000)))


def test_of_noise_there_are_no_chain_steps_to_tell():
    said = forecast(job(nn.Flatten(), GaussianNoise(0.1)))
    assert "no chain-steps" in said
    assert "expected time" not in said
