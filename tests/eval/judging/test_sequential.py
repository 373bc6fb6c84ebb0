"""The sequential verdict errs no more often than it says, whenever it stops."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import Proposal, ThreatModel
from ebm_defense.defense import as_defense
from ebm_defense.eval import Judge
from ebm_defense.eval.judging.sequential import (
    BROKEN,
    OPEN,
    STANDS,
    Sequential,
    decide,
    log_evidence,
    schedule,
)

votes = st.integers(0, 60)


@pytest.mark.parametrize(("ahead", "behind"), [(0, 0), (5, 0), (0, 5), (7, 3), (40, 38)])
def test_the_evidence_is_the_mixture_it_is_said_to_be(ahead, behind):
    mixture, _ = quad(lambda q: 2 * (2 * q) ** ahead * (2 * (1 - q)) ** behind, 0.5, 1.0)
    assert float(np.exp(log_evidence(ahead, behind))) == pytest.approx(mixture, rel=1e-9)


@given(votes, votes, st.floats(0.0, 0.5))
def test_a_vote_never_raises_the_evidence_for_a_class_that_is_not_ahead(ahead, behind, chance):
    now = np.exp(log_evidence(ahead, behind))
    for_it, against = np.exp(log_evidence([ahead + 1, ahead], [behind, behind + 1]))
    assert chance * for_it + (1 - chance) * against <= now * (1 + 1e-9)


@given(votes, votes)
def test_at_even_chances_the_evidence_is_a_martingale(ahead, behind):
    next_votes = np.exp(log_evidence([ahead + 1, ahead], [behind, behind + 1]))
    assert next_votes.mean() == pytest.approx(float(np.exp(log_evidence(ahead, behind))), rel=1e-8)


REPLICATIONS = 1000
POPULATIONS = {
    "tie of two": [0.5, 0.5],
    "just ahead": [0.51, 0.49],
    "just behind": [0.49, 0.51],
    "ahead of many": [0.12] + [0.11] * 8,
    "tie of three": [1 / 3] * 3,
    "behind one of ten": [0.3, 0.34] + [0.045] * 8,
    "ahead of nine": [0.34, 0.3] + [0.045] * 8,
    "sure": [0.9] + [0.1 / 9] * 9,
    "lost": [0.1 / 9] * 9 + [0.9],
}


def outcomes(population: list[float], alpha: float, most: int) -> np.ndarray:
    """What replications on fresh votes decide, the label being class 0, in growing batches."""
    generator = np.random.default_rng(len(population))
    counts = np.zeros((REPLICATIONS, len(population)), dtype=np.int64)
    found = np.full(REPLICATIONS, OPEN)
    for numbers in schedule(alpha, most):
        counts += generator.multinomial(len(numbers), population, size=REPLICATIONS)
        now = decide(counts, np.zeros(REPLICATIONS, dtype=int), alpha)
        found = np.where(found == OPEN, now, found)
    return found


@pytest.mark.parametrize("name", POPULATIONS)
def test_the_error_is_within_its_level(name):
    population, alpha = POPULATIONS[name], 0.1
    truth = STANDS if population[0] > max(population[1:]) + 1e-9 else BROKEN
    found = outcomes(population, alpha, most=2000)
    wrong = ((found != truth) & (found != OPEN)).sum()
    # A bound of 100 on the mean; a test that erred in exactly 10% would pass 125 once in 200.
    assert wrong <= alpha * REPLICATIONS
    if name in ("sure", "lost"):
        assert (found == truth).all()


def test_looking_after_every_vote_does_not_raise_the_error():
    generator, alpha = np.random.default_rng(0), 0.1
    ahead = np.cumsum(generator.random((REPLICATIONS, 500)) < 0.5, axis=1)
    ever = log_evidence(ahead, np.arange(1, 501) - ahead).max(axis=1) >= -math.log(alpha)
    # Ville's inequality is nearly tight here, so that a wrong formula would show.
    assert 0.03 * REPLICATIONS < ever.sum() <= alpha * REPLICATIONS


def test_classes_without_votes_are_rivals_too():
    assert decide([[30, 0, 0]], [1], 0.01).tolist() == [BROKEN]
    assert decide([[30, 0, 0]], [0], 0.01).tolist() == [STANDS]
    assert decide([[2, 1, 0]], [0], 0.01).tolist() == [OPEN]


@pytest.mark.parametrize("alpha", [0.5, 0.01, 1e-6])
@pytest.mark.parametrize("most", [1, 3, 40, 150])
def test_batches_grow_and_together_are_all_the_draws(alpha, most):
    batches = list(schedule(alpha, most))
    assert [n for batch in batches for n in batch] == list(range(most))
    assert all(a.stop <= b.stop for a, b in pairwise(batches))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_a_level_that_is_none_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha"):
        Sequential(alpha=alpha)


# In the judge.


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above one half, with logits of ±1."""

    def forward(self, x):
        bright = torch.sign(x.flatten(1).mean(1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


class Shaken(Purifier):
    """Moves a whole image up or down by normal noise, and remembers the key of every chain."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def purify(self, images, noise):
        self.calls.append(noise.keys.tolist())
        return images + 0.1 * noise.normal(0, images[:, :1, :1, :1])


WRONG = torch.tensor([1.0, -1.0])
MEANS = (0.9, 0.1, 0.5, 0.62, 0.47)


def judged(means, rule, ids=None, defense=None, most=100):
    images = torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    model = defense or PurifiedClassifier(Brightness(), Shaken(), max_chains=10_000)
    judge = Judge(
        model,
        images,
        torch.ones(len(means), dtype=torch.long),
        ids=ids or range(len(means)),
        threat=ThreatModel(eps=0.5),
        replicates=most,
        rule=rule,
        seed=0,
        purpose="test",
    )
    suspicion = WRONG.expand(3, len(means), 2)
    judge(Proposal(1, torch.arange(len(means)), images, suspicion))
    return judge, model


def test_clear_images_take_few_draws_and_open_ones_all():
    judge, _ = judged(MEANS, Sequential())
    verdict = judge.verdict
    assert verdict.stands[:2].tolist() == [True, False]
    assert (verdict.draws[:2] < 20).all()
    assert verdict.undecided.tolist() == [False, False, True, False, True]
    assert verdict.draws[2] == 100


def test_images_that_are_decided_draw_no_more_and_the_others_draw_together():
    _, model = judged(MEANS, Sequential())
    sizes = [len(keys) for keys in model.purifier.calls]
    batches = [len(b) for b in schedule(0.005, 100)]
    images = [size // batch for size, batch in zip(sizes, batches, strict=False)]
    assert images[0] == 5
    assert images == sorted(images, reverse=True)
    assert images[-1] < 5
    drawn = [key for keys in model.purifier.calls for key in keys]
    assert len(drawn) == len(set(drawn))


def test_a_verdict_does_not_depend_on_what_is_judged_beside_it():
    together = judged(MEANS, Sequential())[0].verdict
    for i, mean in enumerate(MEANS):
        alone = judged([mean], Sequential(), ids=[i])[0].verdict
        for field in ("stands", "draws", "undecided", "votes"):
            assert getattr(alone, field)[0] == getattr(together, field)[i]


def test_a_deterministic_defense_is_decided_on_one_chain():
    judge, _ = judged([0.9, 0.1], Sequential(), defense=as_defense(Brightness()))
    assert judge.verdict.stands.tolist() == [True, False]
    assert not judge.verdict.undecided.any()


def test_a_later_look_at_the_same_image_needs_more_evidence():
    judge, _ = judged([0.9], Sequential())
    first = int(judge.verdict.draws[0])
    images = torch.full((1, 1, 4, 4), 0.9)
    for step in range(2, 30):
        judge(Proposal(step, torch.arange(1), images, WRONG.expand(3, 1, 2)))
    assert int(judge.verdict.draws[0]) > first


def test_votes_are_what_brings_an_image_before_the_judge():
    # Two draws of three are right, but the mean of the logits is wrong.
    logits = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[9.0, 0.0]]])
    labels = torch.tensor([1])
    assert not Sequential().suspects(logits, labels, lambda z: z.mean(0)).any()
    assert Sequential().suspects(logits[1:], labels, lambda z: z.mean(0)).all()
