"""Gradients from scores: right on average, and climbed by Adam."""

import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import SPSA, CrossEntropy, Identity, Margin, ScoreFree, ThreatModel
from ebm_defense.attacks.gradients.score_free import _keys, _signs
from ebm_defense.defense import as_defense
from ebm_defense.noise import chain_keys
from ebm_defense.purifiers.baselines import GaussianNoise

EPS = 0.05


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, 1, 5, 5), generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 2


@pytest.fixture
def linear(two_class):
    return two_class(torch.randn((1, 5, 5), generator=torch.Generator().manual_seed(2)).double())


def estimate(defense, samples, replicates=1, loss=None):
    images, labels = data()
    keys = chain_keys(0, "test", range(3), range(replicates))
    gradient = ScoreFree(samples=samples)
    return gradient(defense, images, labels, keys, loss or Margin()).gradient


def true_gradient(linear):
    labels = data()[1]
    return (1.0 - 2.0 * labels).view(-1, 1, 1, 1) * linear.weight


def towards(targets):
    """A loss that holds one target an image, as targeted attacks make it."""
    return lambda logits, labels: logits.mean(0).gather(1, targets[:, None]).squeeze(1)


def test_a_targeted_loss_keeps_each_images_target(linear):
    targets = torch.tensor([1, 0, 1])
    together = estimate(as_defense(linear), 5, loss=towards(targets))
    own = estimate(as_defense(linear), 5, loss=towards(1 - targets))
    # The two logits are ±g/2, so that the targets alone decide on the sign.
    torch.testing.assert_close(together, -own)
    signed = estimate(as_defense(linear), 5, loss=towards(torch.ones(3, dtype=torch.long)))
    torch.testing.assert_close(together, (2.0 * targets - 1.0).view(-1, 1, 1, 1) * signed)


@pytest.mark.parametrize("samples", [100, 1600])
def test_the_gradient_of_a_linear_margin_is_met_as_samples_allow(linear, samples):
    # Of v·(v·w) a pixel has the mean w_i and the variance ‖w‖² − w_i².
    error = estimate(as_defense(linear), samples) - true_gradient(linear)
    expected = (linear.weight.square().sum() - linear.weight.square()).mean() / samples
    assert float(error.square().mean()) == pytest.approx(float(expected), rel=0.35)
    assert abs(float(error.mean())) < 4.0 * float((expected / error.numel()).sqrt())


def test_what_is_random_cancels_in_every_pair(linear):
    # On a linear margin the noise adds the same to both sides.
    bare = estimate(as_defense(linear), 50)
    noisy = estimate(PurifiedClassifier(linear, GaussianNoise(0.3)), 50)
    torch.testing.assert_close(noisy, bare, rtol=0.0, atol=1e-9)


def test_every_pair_has_noise_and_a_direction_of_its_own():
    keys = chain_keys(0, "test", range(3), range(2))
    own = _keys(keys, range(4))
    assert own.shape == (2, 12)
    assert len(torch.cat([own.flatten(), keys.flatten()]).unique()) == 30
    images = data()[0]
    assert not torch.equal(_signs(keys, 0, images), _signs(keys, 1, images))


def test_the_estimate_does_not_depend_on_how_many_chains_run_at_a_time(linear):
    few = PurifiedClassifier(linear, GaussianNoise(0.3), max_chains=6)
    many = PurifiedClassifier(linear, GaussianNoise(0.3), max_chains=400)
    found = [estimate(d, 10, replicates=2, loss=CrossEntropy()) for d in (few, many)]
    torch.testing.assert_close(*found)


def test_it_needs_no_gradient_of_the_classifier(linear):
    images, labels = data()
    attack = SPSA(threat=ThreatModel(eps=EPS), steps=2, gradient=ScoreFree(samples=4))

    @torch.no_grad()
    def scores(x):
        return linear(x).round(decimals=3)

    assert attack(scores, images, labels).shape == images.shape


def test_spsa_climbs_by_adam(linear, listen):
    images, labels = data()
    heard = listen()
    gradient = ScoreFree(samples=4)
    attack = SPSA(threat=ThreatModel(eps=EPS), steps=4, gradient=gradient, random_start=False)
    attack.run(as_defense(linear), images, labels, ids=range(3), seed=0, judge=heard)
    x = torch.nn.Parameter(images.clone())
    adam = torch.optim.Adam([x], lr=0.01, maximize=True)
    for step, proposal in enumerate(heard.proposals):
        torch.testing.assert_close(proposal.images, x.data)
        keys = chain_keys(0, f"attack step {step}", range(3), range(1))
        x.grad = gradient(as_defense(linear), x.data, labels, keys, Margin()).gradient
        adam.step()
        x.data = (images + (x.data - images).clamp(-EPS, EPS)).clamp(0.0, 1.0)


def test_spsa_breaks_what_the_gradient_breaks(linear):
    images, labels = data()
    worst = EPS * float(linear.weight.abs().sum())
    sign = 2.0 * labels - 1.0
    shift = (0.7 * worst - sign * linear.margin(images)) * sign
    images = images.clamp(0.3, 0.7)
    shift = (0.7 * worst - sign * linear.margin(images)) * sign
    images = images + shift.view(-1, 1, 1, 1) * linear.weight / linear.weight.square().sum()
    images = images.clamp(EPS, 1.0 - EPS)
    assert bool((sign * linear.margin(images) > 0.3 * worst).all())
    attack = SPSA(threat=ThreatModel(eps=EPS), steps=40, gradient=ScoreFree(samples=64))
    assert bool((linear(attack(linear, images, labels)).argmax(1) != labels).all())


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"delta": 0.0}, {"delta": float("nan")}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        ScoreFree(**wrong)


def test_its_cost_is_two_chains_a_sample_and_one_for_the_judge(linear):
    defense = PurifiedClassifier(linear, GaussianNoise(0.1))
    defense.purifier.chain_steps = 5
    assert ScoreFree(samples=8).chain_steps(defense) == 17 * 5
    assert Identity().chain_steps(defense) == 5
