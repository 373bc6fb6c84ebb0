"""The wrapped classifier averages replicates, whatever the chunks, and carries BPDA gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ebm_defense.classifiers import normalized
from ebm_defense.defense import (
    AVERAGES,
    PurifiedClassifier,
    as_defense,
    mean_log_softmax,
    mean_logits,
    mean_softmax,
    votes,
)
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.baselines import GaussianNoise, NoPurifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.registry import baseline

CLASSES = 4
quick = settings(
    deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=seeded(seed), dtype=torch.float64)


def small_classifier() -> nn.Module:
    """A smooth network, so that gradients differ between purified replicates."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, CLASSES))


def small_defense(replicates=5, steps=3, **options) -> PurifiedClassifier:
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    purifier = LangevinPurifier(energy, steps=steps, step_size=0.2, precision="fp32")
    options = {"seed": 7} | options
    return PurifiedClassifier(small_classifier(), purifier, replicates, **options).double()


def logits_and_gradient(defense: PurifiedClassifier, images: torch.Tensor):
    images = images.clone().requires_grad_()
    logits = defense(images)
    weights = torch.randn(logits.shape, generator=seeded(5), dtype=logits.dtype)
    return logits.detach(), torch.autograd.grad((weights * logits).sum(), images)[0]


# Chunking


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("max_chains", [1, 3])
def test_chunking_changes_neither_logits_nor_gradient(average, max_chains):
    whole = logits_and_gradient(small_defense(average=average, max_chains=1000), images_of(4))
    chunked = logits_and_gradient(
        small_defense(average=average, max_chains=max_chains), images_of(4)
    )
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@quick
@given(count=st.integers(1, 5), replicates=st.integers(1, 4), max_chains=st.integers(1, 30))
def test_any_chunk_size_purifies_each_replicate_of_each_image_alike(count, replicates, max_chains):
    keys = chain_keys(3, "test", range(count), range(replicates))
    images = images_of(count)
    defense = small_defense(replicates, steps=1, max_chains=max_chains)
    found = defense.purify_replicates(images, keys)
    for r in range(replicates):
        alone = defense.purifier(images, noise=KeyedNoise(keys[r]))
        torch.testing.assert_close(found[r], alone, rtol=0, atol=1e-13)


def test_no_chunk_is_larger_than_max_chains():
    sizes = {"purifier": [], "classifier": []}

    class Recording(NoPurifier):
        stochastic = True

        def purify(self, images, noise):
            sizes["purifier"].append(len(images))
            assert len(noise.keys) == len(images)
            return images

    def classifier(x):
        sizes["classifier"].append(len(x))
        return x.flatten(1)[:, :3]

    defense = PurifiedClassifier(_Wrap(classifier), Recording(), 5, max_chains=4)
    defense(images_of(3))
    assert sizes == {"purifier": [4, 4, 4, 3], "classifier": [4, 4, 4, 3]}


class _Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_an_images_replicates_do_not_depend_on_the_other_images():
    defense = small_defense()
    images, keys = images_of(4), chain_keys(0, "test", [9, 5, 2, 8], range(3))
    together = defense.replicate_logits(images, keys)
    alone = defense.replicate_logits(images[2:3], chain_keys(0, "test", [2], range(3)))
    torch.testing.assert_close(together[:, 2:3], alone, rtol=0, atol=1e-13)


# Averages


def replicate_logits() -> torch.Tensor:
    return 3 * torch.randn(6, 5, CLASSES, generator=seeded(2), dtype=torch.float64)


def test_logits_are_averaged():
    z = replicate_logits()
    torch.testing.assert_close(mean_logits(z), sum(z) / 6)


def test_log_softmaxes_are_averaged():
    z = replicate_logits()
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(mean_log_softmax(z), sum(p.log()) / 6)


def test_softmaxes_are_averaged_with_all_the_digits_of_the_logits():
    z = replicate_logits()
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(mean_softmax(z), (sum(p) / 6).log(), rtol=1e-12, atol=1e-12)


def test_votes_are_counted():
    z = replicate_logits()
    counts = torch.stack([(z.argmax(-1) == c).sum(0) for c in range(CLASSES)], dim=-1).double()
    shares = (counts + 1e-3) / (6 + CLASSES * 1e-3)
    torch.testing.assert_close(votes(z), shares.log())


@pytest.mark.parametrize("average", ["softmax", "votes"])
def test_softmax_and_votes_are_log_probabilities(average):
    total = AVERAGES[average](replicate_logits()).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(5).double(), rtol=0, atol=1e-12)


def test_votes_stay_finite_where_nobody_votes_for_a_class():
    z = torch.tensor([[[9.0, 0.0, -9.0]]]).expand(7, 2, 3)
    shares = votes(z)
    assert bool(shares.isfinite().all())
    assert shares.argmax(-1).tolist() == [0, 0]
    assert math.isclose(float(shares[0, 0].exp()), 7.001 / 7.003, rel_tol=1e-6)


def test_votes_carry_the_gradient_of_the_mean_logits():
    z, weights = replicate_logits().requires_grad_(), torch.randn(5, CLASSES).double()
    (by_votes,) = torch.autograd.grad((weights * votes(z)).sum(), z)
    (by_mean,) = torch.autograd.grad((weights * mean_logits(z)).sum(), z)
    torch.testing.assert_close(by_votes, by_mean)


def test_votes_ignore_how_sure_a_replicate_is():
    z = torch.tensor([[[100.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    assert int(mean_logits(z).argmax()) == 0
    assert int(votes(z).argmax()) == 1


@pytest.mark.parametrize("average", AVERAGES)
def test_forward_is_the_average_of_the_replicate_logits(average):
    defense = small_defense(average=average)
    keys = chain_keys(7, "call 1", range(3), range(5))
    expected = AVERAGES[average](defense.replicate_logits(images_of(3), keys))
    torch.testing.assert_close(defense(images_of(3)), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("average", AVERAGES)
def test_one_replicate_predicts_the_same_class_under_every_average(average):
    defense = small_defense(replicates=1, average=average)
    assert torch.equal(
        defense(images_of(6)).argmax(1), small_defense(replicates=1)(images_of(6)).argmax(1)
    )


# Randomness


def test_the_same_seed_gives_the_same_calls():
    a, b = small_defense(seed=3), small_defense(seed=3)
    first, second = a(images_of(2)), a(images_of(2))
    assert torch.equal(b(images_of(2)), first)
    assert torch.equal(b(images_of(2)), second)


def test_two_calls_differ():
    defense = small_defense(seed=3)
    assert not torch.equal(defense(images_of(2)), defense(images_of(2)))


def test_seeds_differ_and_none_is_fresh():
    calls = [small_defense(seed=s)(images_of(2)) for s in (3, 4, None, None)]
    assert not any(torch.equal(a, b) for i, a in enumerate(calls) for b in calls[:i])


def test_the_global_generator_neither_steers_nor_moves():
    torch.manual_seed(0)
    first = small_defense()
    state = torch.get_rng_state()
    logits = first(images_of(2))
    assert torch.equal(torch.get_rng_state(), state)
    second = small_defense()
    torch.manual_seed(99)
    assert torch.equal(second(images_of(2)), logits)


# Gradient


def test_bpda_gradient_is_the_classifiers_at_the_purified_images():
    defense, images = small_defense(replicates=4), images_of(3)
    keys = chain_keys(0, "test", range(3), range(4))
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(defense.replicate_logits(x, keys)[..., 1].sum(), x)

    expected = torch.zeros_like(images)
    for r in range(4):
        purified = defense.purifier(images, noise=KeyedNoise(keys[r])).requires_grad_()
        logits = defense.classifier(purified)
        expected += torch.autograd.grad(logits[:, 1].sum(), purified)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    (clean,) = torch.autograd.grad(defense.classifier(x)[:, 1].sum(), x)
    assert float((found / 4 - clean).abs().max()) > 1e-3  # not merely the clean gradient


def test_forward_carries_the_mean_of_the_replicates_gradients():
    defense, x = small_defense(replicates=4), images_of(3).requires_grad_()
    (found,) = torch.autograd.grad(defense(x)[:, 2].sum(), x)
    keys = chain_keys(7, "call 1", range(3), range(4))
    logits = small_defense(replicates=4).replicate_logits(x, keys)
    (total,) = torch.autograd.grad(logits[..., 2].sum(), x)
    torch.testing.assert_close(found, total / 4, rtol=1e-12, atol=1e-14)


def test_classifier_weights_get_gradients_through_chunks():
    def weight_gradient(max_chains):
        defense = small_defense(max_chains=max_chains)
        defense(images_of(2).requires_grad_()).square().sum().backward()
        return defense.classifier[0].weight.grad

    torch.testing.assert_close(weight_gradient(3), weight_gradient(1000))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predictions_are_the_same_where_gradients_are_switched_off(mode):
    expected, defense = small_defense(max_chains=3)(images_of(3)), small_defense(max_chains=3)
    with mode():
        logits = defense(images_of(3))
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=0)


# Deterministic purifiers


class Counting(Purifier):
    """Counts how many images it saw."""

    stochastic = False
    seen = 0

    def purify(self, images, noise):
        self.seen += len(images)
        return images


def test_a_purifier_that_was_checked_to_be_deterministic_is_run_once():
    purifier = Counting()
    defense = PurifiedClassifier(small_classifier(), purifier, replicates=16).double()
    torch.testing.assert_close(defense(images_of(3)), defense.classifier(images_of(3)))
    purifier.seen = 0
    defense(images_of(3))
    assert purifier.seen == 3


def test_no_purifier_is_the_classifier_itself():
    classifier = small_classifier().double()
    torch.testing.assert_close(as_defense(classifier)(images_of(3)), classifier(images_of(3)))


def test_as_defense_keeps_a_defense_and_wraps_a_function():
    defense = small_defense()
    assert as_defense(defense) is defense
    wrapped = as_defense(lambda x: x.flatten(1)[:, :3])
    assert torch.equal(wrapped(images_of(2)), images_of(2).flatten(1)[:, :3])


def test_a_foreign_function_serves_as_purifier():
    defense = PurifiedClassifier(
        small_classifier(), lambda x: x + 0.1 * torch.randn_like(x), 3, seed=0
    )
    images = images_of(2).float().requires_grad_()
    logits = defense(images)
    assert logits.shape == (2, CLASSES)
    assert float(torch.autograd.grad(logits.sum(), images)[0].abs().sum()) > 0


# Module manners


def test_the_defense_starts_in_eval_mode_and_moves_as_one():
    defense = small_defense()
    assert not defense.training
    assert all(p.dtype == torch.float64 for p in defense.parameters())
    assert next(defense.parameters()).device.type == "cpu"


def test_the_undefended_classifier_is_the_classifier_unless_given():
    classifier, other = small_classifier(), small_classifier()
    assert PurifiedClassifier(classifier, NoPurifier()).undefended is classifier
    assert PurifiedClassifier(classifier, NoPurifier(), undefended=other).undefended is other


def test_a_normalised_classifier_sees_purified_images_in_its_own_units():
    seen = []
    inner = _Wrap(lambda x: seen.append(x) or x.flatten(1)[:, :2])
    defense = PurifiedClassifier(normalized(inner, 0.5, 0.5), baseline("bits:1"))
    defense(torch.rand(4, 1, 8, 8))
    assert set(seen[0].unique().tolist()) == {-1.0, 1.0}


# Refusals


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"replicates": 0}, "replicates"),
        ({"replicates": -3}, "replicates"),
        ({"max_chains": 0}, "max_chains"),
        ({"average": "median"}, "average"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, word):
    with pytest.raises(UsageError, match=word):
        PurifiedClassifier(small_classifier(), NoPurifier(), **bad)


@pytest.mark.parametrize("pixel", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_refused(pixel):
    images = images_of(2)
    images[1, 0, 3, 3] = pixel
    with pytest.raises(UsageError, match="NaN or infinite"):
        small_defense()(images)


@pytest.mark.parametrize("scale", [255.0, -1.0, 2.0])
def test_images_of_another_scale_are_refused(scale):
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        small_defense()(images_of(2) * scale)


def test_images_a_little_outside_are_taken():
    assert small_defense()(images_of(2) * 1.2 - 0.1).shape == (2, CLASSES)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(64)],
    ids=["three axes", "8 bit", "flat"],
)
def test_what_is_no_batch_of_float_images_is_refused(images):
    with pytest.raises(UsageError, match="float tensor"):
        small_defense()(images)


def test_a_refused_call_uses_up_no_noise():
    defense, other = small_defense(), small_defense()
    with pytest.raises(UsageError):
        defense(images_of(2) * 255)
    assert torch.equal(defense(images_of(2)), other(images_of(2)))


@pytest.mark.parametrize("purifier", ["none", "gaussian:0.1"])
def test_an_empty_batch_gives_no_logits(purifier):
    defense = PurifiedClassifier(small_classifier(), baseline(purifier), 3).double()
    assert defense(images_of(0)).shape == (0, CLASSES)


def test_an_empty_batch_of_a_langevin_defense_gives_no_logits():
    assert small_defense()(images_of(0)).shape == (0, CLASSES)


def test_more_replicates_average_the_noise_away():
    def spread(replicates):
        defense = PurifiedClassifier(
            small_classifier(), GaussianNoise(0.3), replicates, seed=0
        ).double()
        with torch.no_grad():
            return torch.stack([defense(images_of(1)) for _ in range(60)]).std(0).mean()

    # 25 times the replicates: a fifth of the spread, each estimated to about 9% from 60 calls.
    assert 0.12 < float(spread(50) / spread(2)) < 0.32
