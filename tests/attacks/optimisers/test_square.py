"""Square: its schedule, its squares, and what it must break."""

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError, load_defense
from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import Margin, Square, ThreatModel
from ebm_defense.attacks.optimisers.square import Incumbent, width
from ebm_defense.attacks.optimisers.square_proposals import PROPOSALS
from ebm_defense.defense import as_defense
from ebm_defense.noise import KeyedNoise
from ebm_defense.purifiers.baselines import GaussianNoise

LAST_OF_A_SHARE = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]


@pytest.mark.parametrize(("halvings", "query"), list(enumerate(LAST_OF_A_SHARE)))
def test_the_share_of_changed_pixels_halves_when_it_was_published_to(query, halvings):
    assert [width(q, 0.8, 6400) for q in (query, query + 1)] == [
        round((0.8 * 6400 / 2**n) ** 0.5) for n in (halvings, halvings + 1)
    ]


@pytest.fixture
def linear(two_class):
    """A linear classifier of smooth weights, which squares can follow."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    return two_class((x + 0.5 * y)[None].double())


def greatest_drop(weight, threat):
    """How far the margin can fall where no pixel comes near the box."""
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[threat.norm]
    return threat.eps * float(weight.flatten().norm(p=dual))


def margins(linear, shares, threat):
    """Grey images whose margin is a share of what eps can do, all of class 1."""
    step = torch.tensor(shares).double().view(-1, 1, 1, 1) * greatest_drop(linear.weight, threat)
    images = 0.5 + step * linear.weight / linear.weight.square().sum()
    return images, torch.ones(len(shares), dtype=torch.long)


# eps, and the greatest share of what it can do that 600 queries are sure to find: all of an edge
# in Linf, less of a bump's fit to a ramp in L2, and of what nine pixels can gather in L1.
REACH = {"Linf": (0.1, 0.9), "L2": (0.7, 0.6), "L1": (0.4, 0.5)}


@pytest.mark.parametrize("norm", REACH)
def test_it_breaks_what_can_be_broken_and_nothing_else(linear, norm):
    eps, most = REACH[norm]
    threat = ThreatModel(norm=norm, eps=eps)
    images, labels = margins(linear, [0.1, most / 2, most - 0.1, most, 1.05, 1.5], threat)
    last = Square(threat=threat, steps=600)(linear, images, labels)
    assert (linear(last).argmax(1) != labels).tolist() == [True] * 4 + [False] * 2


def test_it_breaks_a_random_defense_by_its_mean_margin(linear):
    threat = ThreatModel(eps=0.1)
    images, labels = margins(linear, [0.3, 0.6, 1.5], threat)
    defense = PurifiedClassifier(linear, GaussianNoise(0.2))
    attack = Square(threat=threat, steps=400, replicates=10)
    last = attack(defense, images, labels)
    assert (linear(last).argmax(1) != labels).tolist() == [True, True, False]


@pytest.mark.parametrize("norm", PROPOSALS)
def test_an_incumbent_is_only_replaced_by_a_better_one(linear, listen, norm):
    threat = ThreatModel(norm=norm, eps={"Linf": 0.1, "L2": 0.8, "L1": 4.0}[norm])
    images, labels = margins(linear, [0.5, 0.5], threat)
    heard, moves = listen(), PROPOSALS[norm]
    attack = Square(threat=threat, steps=60)
    attack.run(as_defense(linear), images, labels, ids=range(2), seed=0, judge=heard)
    noise = KeyedNoise(noise_keys(linear, images, labels))
    best = threat.project(images + moves.first(images, threat.eps, noise), images)
    torch.testing.assert_close(heard.proposals[0].images, best)
    kept = 0
    for query, proposal in enumerate(heard.proposals[1:]):
        side = moves.side(width(query, 0.8, 64), 8, 8)
        delta = moves.change(best - images, side, threat.eps, query + 1, noise)
        torch.testing.assert_close(proposal.images, threat.project(images + delta, images))
        better = linear.margin(proposal.images) < linear.margin(best)
        best = torch.where(better.view(-1, 1, 1, 1), proposal.images, best)
        kept += int(better.sum())
    assert 0 < kept < 2 * 60


def noise_keys(linear, images, labels):
    from ebm_defense.attacks.base import lenient
    from ebm_defense.attacks.session import AttackSession

    session = AttackSession(
        as_defense(linear), images, labels, ids=range(2), seed=0, judge=lenient, replicates=1
    )
    return session.noise("squares").keys


def test_a_lucky_incumbent_is_seen_afresh(linear, listen):
    threat, heard = ThreatModel(eps=0.1), listen()
    images, labels = margins(linear, [0.5], threat)
    attack = Square(threat=threat, steps=21, replicates=1, review=5)
    defense = PurifiedClassifier(linear, GaussianNoise(0.5))
    attack.run(defense, images, labels, ids=[0], seed=0, judge=heard)
    assert len(heard.proposals) == attack.looks == 1 + 21 + 4
    noise, kept = KeyedNoise(noise_keys(linear, images, labels)), 0
    shown = iter(heard.proposals)
    best, loss = heard_of(next(shown), labels)
    for query in range(21):
        if query and query % 5 == 0:
            again, loss = heard_of(next(shown), labels)
            assert torch.equal(again, best)
        x, challenge = heard_of(next(shown), labels)
        side = PROPOSALS["Linf"].side(width(query, 0.8, 64), 8, 8)
        change = PROPOSALS["Linf"].change(best - images, side, threat.eps, query + 1, noise)
        torch.testing.assert_close(x, threat.project(images + change, images))
        if challenge > loss:
            best, loss, kept = x, challenge, kept + 1
    assert kept > 1


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 10, 11])
def test_nothing_is_seen_afresh_after_the_last_query(linear, listen, steps):
    threat, heard = ThreatModel(eps=0.1), listen()
    images, labels = margins(linear, [0.5], threat)
    attack = Square(threat=threat, steps=steps, replicates=1, review=5)
    defense = PurifiedClassifier(linear, GaussianNoise(0.2))
    attack.run(defense, images, labels, ids=[0], seed=0, judge=heard)
    assert len(heard.proposals) == attack.looks == 1 + steps + (steps > 5) + (steps > 10)


def heard_of(proposal, labels):
    """What was proposed of one image, and its loss."""
    return proposal.images, float(Margin()(proposal.logits, labels))


def test_a_challenger_that_is_no_better_is_not_kept():
    before = Incumbent(torch.zeros(3, 1, 1, 1), torch.tensor([1.0, 1.0, 1.0]), torch.arange(3))
    after = before.challenge(torch.ones(3, 1, 1, 1), torch.tensor([0.5, 1.0, 1.5]))
    assert after.x.flatten().tolist() == [0.0, 0.0, 1.0]
    assert after.loss.tolist() == [1.0, 1.0, 1.5]


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"p": 1.5}, {"review": 0}, {"replicates": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        Square(**wrong)


def test_a_rescaled_schedule_ends_as_the_long_one_does(linear):
    images, labels = margins(linear, [2.0], ThreatModel(eps=0.1))
    attack = Square(threat=ThreatModel(eps=0.1), steps=20, rescale=True)
    assert attack._side(0, images) == width(0, 0.8, 64) == 7
    assert attack._side(9, images) == width(4500, 0.8, 64) == 1
    assert attack._side(2, images) == width(1000, 0.8, 64) == 2
    assert attack(linear, images, labels).shape == images.shape


def test_in_l2_it_is_as_strong_as_the_reference(sample):
    torchvision("datasets")  # torchattacks imports it, and it does not load everywhere by itself
    import torchattacks

    model = load_defense("fashion-mnist").undefended.eval().requires_grad_(False)
    images, labels = sample.images[:40], sample.labels[:40]
    images, labels = (part[model(images).argmax(1) == labels] for part in (images, labels))
    threat = ThreatModel(norm="L2", eps=1.0)
    ours = Square(threat=threat, steps=50, rescale=True)(model, images, labels)
    with torch.random.fork_rng():
        reference = torchattacks.Square(model, norm="L2", eps=threat.eps, n_queries=50)
        theirs = threat.project(reference(images, labels), images)
    mine, other = (int((model(x).argmax(1) == labels).sum()) for x in (ours, theirs))
    # One image in ten was seen to fall to one search alone: three standard deviations of that.
    assert abs(mine - other) <= 3 * (len(labels) / 10) ** 0.5
    assert max(mine, other) < 0.8 * len(labels)
