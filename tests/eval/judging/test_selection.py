"""What is judged is chosen on draws of its own: the strongest image, and not the luckiest."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import PGD, ThreatModel
from ebm_defense.attacks.shortlist import Shortlist
from ebm_defense.eval import Protocol, Selection, evaluate
from ebm_defense.eval.judging.selection import (
    SELDOM,
    course_looks,
    course_right,
    draws_to_leave,
)

WIDE = ThreatModel(eps=0.5)


def shades(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def kept(shortlist: Shortlist) -> list[set[float]]:
    """The shades that are kept of each image."""
    images, _, _, filled = shortlist.candidates()
    shade = images[:, :, 0, 0, 0]
    return [{round(float(s), 3) for s in shade[filled[:, i], i]} for i in range(filled.shape[1])]


def test_the_lowest_margins_and_the_last_image_are_kept():
    shortlist, both = Shortlist(shades(0.5, 0.5), size=3), torch.arange(2)
    offers = [(0.1, [3.0, -1.0]), (0.2, [2.0, 0.5]), (0.3, [1.0, 4.0]), (0.4, [9.0, 9.0])]
    for step, (shade, margins) in enumerate(offers):
        shortlist.offer(both, shades(shade, shade), torch.tensor(margins), step)
    assert kept(shortlist) == [{0.2, 0.3, 0.4}, {0.1, 0.2, 0.4}]


def test_an_image_that_is_proposed_again_takes_one_place():
    shortlist = Shortlist(shades(0.5), size=3)
    for step, (shade, margin) in enumerate([(0.1, 2.0), (0.2, 3.0), (0.1, 1.0), (0.1, 5.0)]):
        shortlist.offer(torch.arange(1), shades(shade), torch.tensor([margin]), step)
    assert kept(shortlist) == [{0.1, 0.2}]


@pytest.mark.parametrize("replicates", [1, 4, 15, 16])
@pytest.mark.parametrize("test", [1, 3])
def test_an_image_that_is_not_surely_broken_is_left_no_more_often_than_the_level(replicates, test):
    level, draws = 0.05, draws_to_leave(0.05, test, replicates)
    # The least chance of a right draw with which the majority is right more than seldom.
    chances = np.linspace(0.0, 1.0, 10_001)
    often = binom.sf(np.ceil(replicates / 2) - 1, replicates, chances) > SELDOM
    least = chances[often][0]
    assert (1.0 - least) ** draws <= level / (test * (test + 1)) + 1e-9
    # And hardly more draws than that takes: the chances above are a grid.
    assert (1.0 - least) ** (0.95 * draws - 2) > level / (test * (test + 1))


class Shaky(Purifier):
    """Moves a whole image up or down."""

    def purify(self, images, noise):
        return images + 0.1 * noise.normal(0, images[:, :1, :1, :1])


class Bright(nn.Module):
    def forward(self, x):
        margin = x.flatten(1).mean(1) - 0.5
        return torch.stack([-margin, margin], dim=1)


class Wander(PGD):
    """Proposes the originals, then a darker image once, then the originals again."""

    def run(self, defense, images, labels, *, ids, seed, judge=None):
        from ebm_defense.attacks import Proposal
        from ebm_defense.noise import chain_keys

        for step in range(self.steps + 1):
            x = images - 0.12 if step == 3 else images + 1e-4 * step
            keys = chain_keys(seed, f"wander {step}", ids, range(self.replicates))
            with torch.no_grad():
                logits = defense.replicate_logits(x, keys)
            judge(Proposal(step, torch.arange(len(x)), x, logits))
        return images


@pytest.mark.parametrize(("candidates", "step"), [(4, 3), (1, 20)])
def test_the_strongest_image_is_chosen_and_not_the_luckiest(candidates, step):
    attack = Wander(threat=WIDE, steps=20, replicates=1)
    selection = Selection(draws=400, candidates=candidates, leave=0.0)
    protocol = Protocol(name="mine", attacks=(attack,), judge_replicates=64, selection=selection)
    defense = PurifiedClassifier(Bright(), Shaky(), replicates=16)
    report = evaluate(defense, shades(*[0.6] * 8), torch.ones(8, dtype=torch.long), protocol)
    assert (report.records["0 PGD-20: chosen at"] == step).sum() >= (8 if candidates == 1 else 6)


def test_what_is_surely_broken_is_left_and_never_what_stands():
    attack = PGD(threat=ThreatModel(eps=1e-6), steps=40, step_size=1e-6, replicates=4)
    defense = PurifiedClassifier(Bright(), Shaky(), replicates=16)
    images, labels = shades(0.1, 0.48, 0.52, 0.9), torch.ones(4, dtype=torch.long)
    records = evaluate(defense, images, labels, attacks=[attack], judge_replicates=32).records
    assert records["0 PGD-40: left"].tolist() == [1, 0, 0, 0]
    assert records["0 PGD-40: stands"].tolist()[0] == 0.0
    course = course_right(records["0 PGD-40: course"])
    assert course.shape == (4, 41)
    assert course[0].sum() == 0
    assert course[3].sum() == 41


def test_of_a_long_attack_some_steps_are_kept_evenly_apart():
    assert course_looks(3) == [0, 1, 2]
    kept = course_looks(5001)
    assert (kept[0], kept[-1], len(kept)) == (0, 5000, 101)


@pytest.mark.parametrize("numbers", [{"draws": 0}, {"candidates": 0}, {"leave": 1.0}])
def test_a_selection_out_of_range_is_refused(numbers):
    with pytest.raises(UsageError, match="a selection needs"):
        Selection(**numbers)
