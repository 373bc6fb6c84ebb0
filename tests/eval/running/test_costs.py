"""A run's costs are what was really spent, whoever spent it."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier
from ebm_defense.attacks import (
    APGD,
    PGD,
    SPSA,
    DiffHammer,
    FoolboxAttack,
    ScoreFree,
    Square,
    ThreatModel,
    Transfer,
)
from ebm_defense.eval import OneStage, Protocol, evaluate
from ebm_defense.eval.storage.run_folder import MemoryStore

runner = importlib.import_module("ebm_defense.eval.running.runner")

THREAT = ThreatModel(eps=0.02)
COMMON = {"threat": THREAT, "replicates": 2}
PGD_2 = PGD(steps=2, step_size=0.01, **COMMON)
DEEP_FOOL = FoolboxAttack.of("LinfDeepFoolAttack", steps=2, **COMMON)
ATTACKS = (
    PGD_2,
    APGD(steps=3, review=1, **COMMON),
    DiffHammer(steps=2, restarts=2, **COMMON),
    SPSA(steps=2, gradient=ScoreFree(samples=3), **COMMON),
    Square(steps=4, review=2, **COMMON),
    DEEP_FOOL,
)


@pytest.fixture
def job(counting_purifier):
    """Make an evaluation of a few images, all purifications of which are counted."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand((5, 1, 6, 6), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).requires_grad_(False)
    labels = classifier(images).argmax(1)
    labels[1] = (labels[1] + 1) % 3

    def make(attacks, **rules):
        protocol = Protocol(name="custom", attacks=tuple(attacks), judge_replicates=4, **rules)
        defense = PurifiedClassifier(classifier, counting_purifier, replicates=2)
        return runner.Job(defense=defense, images=images, labels=labels, protocol=protocol, seed=0)

    return make


@pytest.mark.parametrize(
    "rules", [{}, {"looks": "last", "verdict": OneStage()}, {"ensemble": True}]
)
def test_every_chain_step_is_counted_once(job, counting_purifier, rules) -> None:
    done = runner.run(job(ATTACKS, **rules), MemoryStore())
    assert sum(done.costs["steps"].values()) == sum(counting_purifier.rows) * 7


def test_what_is_crafted_on_another_defense_is_counted_too(job, counting_purifier) -> None:
    here = job([PGD_2])
    other = Transfer(attack=PGD_2, replicates=2, source=here.defense)
    twice = Transfer(attack=DEEP_FOOL, replicates=2, source=here.defense)
    assert (other.open_ended, twice.open_ended) == (False, True)
    done = runner.run(job([other, twice]), MemoryStore())
    assert sum(done.costs["steps"].values()) == sum(counting_purifier.rows) * 7


def test_a_report_says_at_least_where_a_library_decides(job) -> None:
    for attack, least in ((PGD_2, ""), (DEEP_FOOL, "At least ")):
        made = job([attack])
        report = evaluate(
            made.defense, made.images, made.labels, attacks=[attack], judge_replicates=4
        )
        planned = runner.planned_steps(made)
        assert f". {least}{planned:,} chain-steps an image" in report.caption()
