"""The judge decides on draws of its own, and on images within the threat model."""

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, Purifier, UsageError
from ebm_defense.attacks import ATTACKS, PGD, Proposal, ThreatModel, Transfer, make_attack
from ebm_defense.attacks.catalogue import takes
from ebm_defense.defense import as_defense
from ebm_defense.eval import Judge, TwoStage, evaluate, judge_images
from ebm_defense.noise import chain_keys, derive_seed

THREAT = ThreatModel(eps=0.1)
SIZE = 4
RIGHT, WRONG = [-1.0, 1.0], [1.0, -1.0]


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above one half, with logits of ±1."""

    def forward(self, x):
        bright = torch.sign(x.flatten(1).mean(1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


class Graded(nn.Module):
    """The same classes, with a slope to climb, and two that are never chosen."""

    def forward(self, x):
        bright = 10.0 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-bright, bright, -bright - 1.0, bright - 1.0], dim=1)


class Recorder(Purifier):
    """Adds no noise and remembers the key and the image of every chain."""

    def __init__(self):
        super().__init__()
        self.keys, self.images = [], []

    def purify(self, images, noise):
        self.keys += noise.keys.tolist()
        self.images += [image.numpy().tobytes() for image in images.detach()]
        return images + 0.0 * noise.normal(0, images)


class OftenInverted(Purifier):
    """Inverts one image in five, drawn anew for every chain."""

    def purify(self, images, noise):
        draw = noise.normal(0, images[:, :1, :1, :1])
        return torch.where(draw < -0.8416, 1.0 - images, images)


def bright(*means: float) -> torch.Tensor:
    return torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE).clone()


def judge(originals, model=None, labels=None, **options):
    labels = torch.ones(len(originals), dtype=torch.long) if labels is None else labels
    settings = {
        "ids": range(len(originals)),
        "threat": THREAT,
        "replicates": 20,
        "seed": 0,
        "purpose": "test",
    }
    return Judge(as_defense(model or Brightness()), originals, labels, **(settings | options))


def proposal(images, *logits, step=1, rows=None) -> Proposal:
    rows = torch.arange(len(images)) if rows is None else torch.tensor(rows)
    return Proposal(step, rows, images, torch.tensor([logits]))


def test_an_attacks_own_claim_breaks_nothing():
    originals = bright(0.7, 0.8)
    court = judge(originals)
    assert court(proposal(originals, WRONG, WRONG)).tolist() == [True, True]
    assert court.verdict.stands.all()
    assert court.verdict.broken_at.tolist() == [-1, -1]
    assert court.verdict.votes.tolist() == [1.0, 1.0]


def test_an_image_that_fails_on_fresh_draws_is_broken_at_its_step():
    originals = bright(0.55, 0.8)
    court = judge(originals)
    moved = THREAT.project(originals - 0.1, originals)
    assert court(proposal(moved, WRONG, RIGHT, step=3)).tolist() == [False, True]
    assert court.verdict.broken_at.tolist() == [3, -1]
    assert court.verdict.votes[0] == 0.0
    assert court.verdict.votes[1].isnan()
    assert torch.equal(court.verdict.images, moved)


def test_an_image_that_is_broken_stays_broken():
    originals = bright(0.55)
    court = judge(originals)
    moved = THREAT.project(originals - 0.1, originals)
    court(proposal(moved, WRONG, step=3))
    assert court(proposal(originals, RIGHT, step=4)).tolist() == [False]
    assert court(proposal(originals, WRONG, step=5)).tolist() == [False]
    assert court(proposal(moved - 0.01, WRONG, step=6)).tolist() == [False]
    assert court.verdict.broken_at.tolist() == [3]
    assert court.verdict.votes.tolist() == [0.0]
    assert torch.equal(court.verdict.images, moved)


def test_a_verdict_is_not_changed_by_what_is_heard_after_it():
    originals = bright(0.55)
    court = judge(originals)
    before = court.verdict
    court(proposal(THREAT.project(originals - 0.1, originals), WRONG))
    assert before.stands.all()
    assert torch.equal(before.images, originals)


def test_an_image_outside_the_threat_model_is_judged_where_it_is_projected_to():
    originals = bright(0.7)
    court = judge(originals)
    # 0.3 is dark, but a tenth below 0.7 is still bright.
    assert court(proposal(bright(0.3), WRONG)).all()
    assert float(THREAT.size(court.verdict.images, originals)) <= THREAT.eps + 1e-6


def test_an_image_outside_the_threat_model_is_looked_at_again():
    originals = bright(0.55)
    court = judge(originals)
    # The claim of innocence belongs to another image than the projected one, which is dark.
    assert not court(proposal(bright(0.2), RIGHT)).any()
    torch.testing.assert_close(court.verdict.images, bright(0.45))


def test_pixels_outside_the_box_are_clipped_before_judgement():
    originals = bright(0.95)
    court = judge(originals)
    court(proposal(bright(1.05), RIGHT))
    assert float(court.verdict.images.max()) <= 1.0


def test_a_proposal_of_some_rows_concerns_these_alone():
    originals = bright(0.55, 0.55, 0.55)
    court = judge(originals)
    dark = bright(0.45)
    assert court(proposal(dark, WRONG, rows=[1])).tolist() == [False]
    assert court.verdict.stands.tolist() == [True, False, True]
    assert torch.equal(court.verdict.images[[0, 2]], originals[[0, 2]])


def test_images_struck_beforehand_count_as_broken_at_the_start():
    originals = bright(0.7, 0.7)
    court = judge(originals)
    court.strike(torch.tensor([1]))
    court(proposal(originals, RIGHT, RIGHT, step=5))
    assert court.verdict.stands.tolist() == [True, False]
    assert court.verdict.broken_at.tolist() == [-1, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused_by_the_images_names(value):
    court = judge(bright(0.7, 0.7, 0.7), ids=[40, 41, 42])
    with pytest.raises(UsageError, match=r"image 41\b.*\.$"):
        court(proposal(bright(0.7, 0.7, 0.7), RIGHT, [value, 0.0], RIGHT))


def test_nan_on_fresh_draws_is_refused_though_the_attack_showed_numbers():
    class Fails(nn.Module):
        def forward(self, x):
            return Brightness()(x) * float("nan")

    with pytest.raises(UsageError, match="image 0"):
        judge(bright(0.7), Fails())(proposal(bright(0.7), WRONG))


def test_one_bad_replicate_of_many_is_refused():
    court = judge(bright(0.7))
    logits = torch.tensor([[RIGHT], [[float("nan"), 0.0]], [RIGHT]])
    with pytest.raises(UsageError, match="image 0"):
        court(Proposal(0, torch.arange(1), bright(0.7), logits))


def test_an_image_of_nan_pixels_never_breaks_the_defense():
    class Tolerant(nn.Module):
        def forward(self, x):
            return Brightness()(x.nan_to_num(0.0))

    originals = bright(0.7)
    with pytest.raises(UsageError, match="NaN"):
        judge(originals, Tolerant())(proposal(originals * float("nan"), WRONG))


def test_no_chain_of_an_evaluation_is_ever_run_twice():
    recorder = Recorder()
    defense = PurifiedClassifier(Brightness(), recorder, replicates=2)
    pgd = PGD(threat=THREAT, steps=3, step_size=0.05, replicates=2)
    # Candidates for one image are compared on the same noise; no image gets the same noise twice.
    images, labels = bright(0.7, 0.3, 0.52, 0.9), torch.ones(4, dtype=torch.long)
    evaluate(defense, images, labels, attacks=[Transfer(attack=pgd), pgd], judge_replicates=5)
    probe = set(chain_keys(0, "probe", [0], range(1)).flatten().tolist())
    # Flags ask whether a chain repeats, so they run some of theirs twice.
    flags = derive_seed(0, "flags")
    for purpose in ("replay", "first BPDA", "second BPDA"):
        probe |= set(chain_keys(flags, purpose, [0], range(2)).flatten().tolist())
    chains = zip(recorder.keys, recorder.images, strict=True)
    drawn = [chain for chain in chains if chain[0] not in probe]
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)


def test_the_judge_draws_other_noise_than_the_attack_whatever_it_is_called():
    pgd = PGD(threat=THREAT, steps=2, step_size=0.05, replicates=3)
    originals, labels = bright(0.7, 0.6), torch.ones(2, dtype=torch.long)
    attacked, judged = Recorder(), Recorder()
    defense = PurifiedClassifier(Brightness(), attacked)
    pgd.run(defense, originals, labels, ids=range(2), seed=0)
    court = judge(originals, PurifiedClassifier(Brightness(), judged), purpose="attack step 1")
    for step in range(3):
        court(proposal(originals, WRONG, WRONG, step=step))
    assert len(judged.keys) == 3 * 2 * 20
    assert not set(attacked.keys) & set(judged.keys)


def test_verdicts_of_other_steps_purposes_and_seeds_are_independent():
    seen = []
    for options in ({}, {"purpose": "other"}, {"seed": 1}):
        recorder = Recorder()
        court = judge(bright(0.7), PurifiedClassifier(Brightness(), recorder), **options)
        for step in range(2):
            court(proposal(bright(0.7), WRONG, step=step))
        seen += recorder.keys
    assert len(set(seen)) == len(seen) == 3 * 2 * 20


def test_a_judges_cost_is_counted():
    class Priced(Recorder):
        chain_steps = 10

    spent = []
    court = judge(bright(0.7, 0.8), PurifiedClassifier(Brightness(), Priced()), count=spent.append)
    court(proposal(bright(0.7, 0.8), WRONG, RIGHT))
    assert sum(spent) == 10 * (2 + 20)


BUDGETS = {"steps": 20, "replicates": 1, "restarts": 2, "targets": 1}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_random_error_of_one_pass_in_five_costs_hardly_any_robust_accuracy(name):
    images = bright(*torch.linspace(0.6, 0.95, 40).tolist())
    labels = torch.ones(40, dtype=torch.long)
    defense = PurifiedClassifier(Graded(), OftenInverted())
    # Within eps only inverted images are wrong.
    budget = {k: v for k, v in BUDGETS.items() if k in takes(name)}
    own = "(steps=5, gradient=score-free(samples=8))" if name == "spsa" else ""
    attack = make_attack(name + own, threat=ThreatModel(eps=0.05), **budget)
    report = evaluate(defense, images, labels, attacks=[attack], judge_replicates=150)
    votes = report.records[f"0 {attack.name}: votes"]
    # Of 16 replicates half or more are wrong with a chance of 0.7%, whatever the attack.
    assert report.robust().value > 0.97
    assert abs(votes.mean() - 0.8) < 0.02


def test_random_errors_of_most_passes_are_held_against_the_defense():
    class MostlyInverted(OftenInverted):
        def purify(self, images, noise):
            return 1.0 - super().purify(images, noise)

    images, labels = bright(0.7, 0.8), torch.ones(2, dtype=torch.long)
    found = judge_images(
        PurifiedClassifier(Brightness(), MostlyInverted()), images, images, labels, threat=THREAT
    )
    assert not found.stands.any()
    assert bool(((found.votes > 0.05) & (found.votes < 0.4)).all())


def test_finished_images_are_projected_and_judged():
    originals, labels = bright(0.55, 0.7, 0.3), torch.tensor([1, 1, 1])
    found = judge_images(Brightness(), originals, originals * 0.0, labels, threat=THREAT)
    assert found.stands.tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(found.images, bright(0.45, 0.6, 0.2))


def test_finished_images_are_judged_alike_with_the_same_seed():
    images, labels = bright(0.6, 0.7), torch.ones(2, dtype=torch.long)
    defense = PurifiedClassifier(Brightness(), OftenInverted())
    found = [
        judge_images(defense, images, 1 - images, labels, threat=ThreatModel(eps=0.6), seed=s)
        for s in (3, 3, 4)
    ]
    torch.testing.assert_close(found[0].votes, found[1].votes, equal_nan=True)
    assert found[0].votes[0] != found[2].votes[0]


def test_a_random_model_of_any_origin_gets_all_the_draws():
    seen = []

    def random_model(x):
        seen.append(len(x))
        return Brightness()(x) + 0.1 * torch.randn((len(x), 2))

    dark, labels = bright(0.4, 0.3), torch.ones(2, dtype=torch.long)
    judge_images(random_model, dark, dark, labels, threat=THREAT, replicates=30)
    assert sum(seen) >= 2 * 30


GOOD, ONES = bright(0.6, 0.7), torch.ones(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("originals", "adversarial", "labels", "options"),
    [
        pytest.param(GOOD * 255, GOOD, ONES, {}, id="originals off the scale"),
        pytest.param(GOOD, GOOD * 255, ONES, {}, id="images off the scale"),
        pytest.param(GOOD, GOOD * float("nan"), ONES, {}, id="NaN"),
        pytest.param(GOOD, GOOD[:1], ONES, {}, id="other number"),
        pytest.param(GOOD, GOOD[..., :2], ONES, {}, id="other size"),
        pytest.param(GOOD[0], GOOD[0], ONES, {}, id="no batch"),
        pytest.param(GOOD, GOOD, ONES[:1], {}, id="too few labels"),
        pytest.param(GOOD, GOOD, ONES / 2.0, {}, id="labels no integers"),
        pytest.param(GOOD, GOOD, -ONES, {}, id="negative labels"),
        pytest.param(GOOD, GOOD, ONES + 1, {}, id="labels beyond the classes"),
        pytest.param(GOOD, GOOD, ONES, {"replicates": 0}, id="no replicates"),
        pytest.param(GOOD, GOOD, ONES, {"rule": TwoStage()}, id="a rule for looks"),
    ],
)
def test_finished_images_that_cannot_be_judged_are_refused(originals, adversarial, labels, options):
    with pytest.raises(UsageError):
        judge_images(Brightness(), originals, adversarial, labels, threat=THREAT, **options)
