"""Square: its schedule, its squares, and what it must break."""

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import Square, ThreatModel
from ebm_defense.attacks.square import side, squares, stripes
from ebm_defense.defense import as_defense
from ebm_defense.noise import KeyedNoise
from ebm_defense.purifiers import GaussianNoise

LIKE = torch.zeros(300, 3, 8, 10)
NOISE = KeyedNoise(torch.arange(300) * 7919)


LAST_OF_A_SHARE = [10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]


@pytest.mark.parametrize(("halvings", "query"), list(enumerate(LAST_OF_A_SHARE)))
def test_the_share_of_changed_pixels_halves_when_it_was_published_to(query, halvings):
    assert [side(q, 0.8, 100, 64) for q in (query, query + 1)] == [
        min(max(round((0.8 * 100 * 64 / 2**n) ** 0.5), 1), 64) for n in (halvings, halvings + 1)
    ]


def test_a_side_is_never_longer_than_the_image_nor_shorter_than_a_pixel():
    assert side(0, 1.0, 2, 50) == 2
    assert side(9000, 0.8, 8, 8) == 1


def test_stripes_have_one_sign_a_channel_and_column():
    signs = stripes(LIKE, NOISE)
    assert signs.shape == LIKE.shape
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(signs, signs[:, :, :1].expand_as(signs))
    assert abs(float(signs[:, :, 0].mean())) < 4 / 9000**0.5


@pytest.mark.parametrize("size", [1, 3, 8])
def test_squares_have_one_sign_a_channel_and_come_to_lie_everywhere(size):
    changes = squares(LIKE, size, 5, NOISE)
    touched = changes.abs()
    assert torch.equal(touched[:, :1].expand_as(touched), touched)
    rows, columns = touched[:, 0].amax(2), touched[:, 0].amax(1)
    assert bool((rows.sum(1) == size).all())
    assert bool((columns.sum(1) == size).all())
    assert torch.equal(touched[:, 0], rows[:, :, None] * columns[:, None, :])
    assert bool((rows.diff(dim=1).abs().sum(1) <= 2).all())
    assert bool((touched[:, 0].sum(0) > 0).all())
    constant = changes.flatten(2).sum(2).abs() == size**2
    assert bool(constant.all())


def test_queries_draw_other_squares():
    assert not torch.equal(squares(LIKE, 3, 5, NOISE), squares(LIKE, 3, 6, NOISE))


@pytest.fixture
def linear(two_class):
    """A linear classifier of smooth weights, which squares can follow."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    return two_class((x + 0.5 * y)[None].double())


def margins(linear, shares, eps):
    """Grey images whose margin is a share of what eps can do, all of class 1."""
    worst = eps * float(linear.weight.abs().sum())
    step = torch.tensor(shares).double().view(-1, 1, 1, 1) * worst
    images = 0.5 + step * linear.weight / linear.weight.square().sum()
    return images, torch.ones(len(shares), dtype=torch.long)


def test_it_breaks_what_can_be_broken_and_nothing_else(linear):
    images, labels = margins(linear, [0.1, 0.4, 0.7, 0.9, 1.05, 2.0], eps=0.1)
    attack = Square(threat=ThreatModel(eps=0.1), steps=600)
    last = attack(linear, images, labels)
    assert (linear(last).argmax(1) != labels).tolist() == [True] * 4 + [False] * 2


def test_it_breaks_a_random_defense_by_its_mean_margin(linear):
    images, labels = margins(linear, [0.3, 0.6, 1.5], eps=0.1)
    defense = PurifiedClassifier(linear, GaussianNoise(0.2))
    attack = Square(threat=ThreatModel(eps=0.1), steps=400, replicates=10)
    last = attack(defense, images, labels)
    assert (linear(last).argmax(1) != labels).tolist() == [True, True, False]


def test_an_incumbent_is_only_replaced_by_a_better_one(linear, listen):
    images, labels = margins(linear, [0.5, 0.5], eps=0.1)
    heard = listen()
    attack = Square(threat=ThreatModel(eps=0.1), steps=60)
    attack.run(as_defense(linear), images, labels, ids=range(2), seed=0, judge=heard)
    best = heard.proposals[0].images
    for query, proposal in enumerate(heard.proposals[1:]):
        noise = KeyedNoise(noise_keys(attack, linear, images, labels))
        change = 0.2 * squares(best, side(query, 0.8, 8, 8), query, noise)
        expected = (best + change).clamp(images - 0.1, images + 0.1).clamp(0.0, 1.0)
        torch.testing.assert_close(proposal.images, expected)
        better = linear.margin(proposal.images) < linear.margin(best)
        best = torch.where(better.view(-1, 1, 1, 1), proposal.images, best)


def noise_keys(attack, linear, images, labels):
    from ebm_defense.attacks.base import lenient
    from ebm_defense.attacks.hearing import Hearing

    hearing = Hearing(
        as_defense(linear), images, labels, ids=range(2), seed=0, judge=lenient, replicates=1
    )
    return hearing.noise("squares").keys


def test_a_lucky_incumbent_is_seen_afresh(linear, listen):
    images, labels = margins(linear, [0.5], eps=0.1)
    heard = listen()
    attack = Square(threat=ThreatModel(eps=0.1), steps=11, replicates=1, review=5)
    defense = PurifiedClassifier(linear, GaussianNoise(0.2))
    attack.run(defense, images, labels, ids=[0], seed=0, judge=heard)
    assert len(heard.proposals) == attack.looks == 1 + 11 + 2
    shown = [p.images for p in heard.proposals]
    assert any(torch.equal(shown[6], x) for x in shown[:6])
    assert any(torch.equal(shown[12], x) for x in shown[:12])


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"p": 1.5}, {"review": 0}, {"replicates": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        Square(**wrong)


def test_a_rescaled_schedule_ends_as_the_long_one_does(linear):
    images, labels = margins(linear, [2.0], eps=0.1)
    attack = Square(threat=ThreatModel(eps=0.1), steps=20, rescale=True)
    assert attack._side(0, images) == side(0, 0.8, 8, 8)
    assert attack._side(18, images) == side(9000, 0.8, 8, 8)
    assert attack(linear, images, labels).shape == images.shape
