"""The surrogate is a cheaper process of the same total time, taken end to end."""

from __future__ import annotations

import pytest
import torch

from ebm_defense import LangevinPurifier, PurifiedClassifier, UsageError
from ebm_defense.attacks import (
    GRADIENTS,
    PGD,
    CrossEntropy,
    Full,
    Identity,
    Smoothed,
    Surrogate,
    ThreatModel,
    make_gradient,
)
from ebm_defense.noise import chain_keys
from ebm_defense.purifiers.baselines import NoPurifier
from ebm_defense.purifiers.registry import baseline

SIZE = 8


def world(count: int = 3):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, 1, SIZE, SIZE), generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 3, chain_keys(0, "test", range(count), range(2))


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_cheap_chain_has_the_same_total_time_and_temperature(langevin_defense, steps):
    true = langevin_defense(steps=12).purifier
    cheap = Surrogate(steps=steps).cheap(langevin_defense(steps=12)).purifier
    total = true.settings.steps * true.settings.step_size**2
    assert cheap.settings.steps * cheap.settings.step_size**2 == pytest.approx(total)
    assert cheap.settings.temperature == true.settings.temperature


@pytest.mark.parametrize("through", [Identity(), Full(), Smoothed(stride=1)])
def test_of_as_many_steps_it_is_the_gradient_itself(langevin_defense, through):
    defense, (images, labels, keys) = langevin_defense(steps=4), world()
    plain = through(defense, images, labels, keys, CrossEntropy())
    surrogate = Surrogate(steps=4, through=through)
    found = surrogate(defense, images, labels, keys, CrossEntropy())
    torch.testing.assert_close(found.gradient, plain.gradient)
    assert torch.equal(found.logits, plain.logits)


def test_the_gradient_is_the_cheap_chains_and_the_logits_the_true_ones(langevin_defense):
    defense, (images, labels, keys) = langevin_defense(steps=9), world()
    surrogate = Surrogate(steps=2)
    found = surrogate(defense, images, labels, keys, CrossEntropy())
    cheap = Full()(surrogate.cheap(defense), images, labels, keys, CrossEntropy())
    assert torch.equal(found.gradient, cheap.gradient)
    assert not torch.allclose(found.logits, cheap.logits)
    with torch.no_grad():
        assert torch.equal(found.logits, defense.replicate_logits(images, keys))


def test_it_costs_both_chains(langevin_defense):
    defense = langevin_defense(steps=30)
    through = Identity()
    assert Surrogate(steps=3, through=through).chain_steps(defense) == 33
    assert Surrogate(steps=3).chain_steps(defense) > 33


def test_more_steps_than_the_defense_takes_are_refused(langevin_defense):
    with pytest.raises(UsageError, match="more than the defense's 3"):
        PGD(gradient=Surrogate(steps=4)).chain_steps(langevin_defense(steps=3))
    with pytest.raises(UsageError, match="at least 1 step"):
        Surrogate(steps=0)


def test_a_purifier_without_a_chain_is_refused_and_one_of_none_is_cheap_enough():
    identity = torch.nn.Flatten()
    with pytest.raises(UsageError, match="not a Jpeg's"):
        Surrogate().chain_steps(PurifiedClassifier(identity, baseline("jpeg:75")))
    assert Surrogate().chain_steps(PurifiedClassifier(identity, NoPurifier())) == 0


def test_a_diverging_surrogate_says_so():
    # In a quartic bowl the long steps overshoot further at every step.
    def energy(x):
        return 1e8 * x.pow(4).flatten(1).sum(1)

    purifier = LangevinPurifier(energy, 400, 1e-3, 1.0)
    defense = PurifiedClassifier(torch.nn.Flatten(), purifier)
    images, labels, keys = world()
    with pytest.raises(UsageError, match="diverge"):
        Surrogate(steps=12)(defense, images, labels, keys, CrossEntropy())


@pytest.mark.parametrize("spec", ["bpda", "full", "smoothed", "surrogate(steps=2)"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_gradient_drives_pgd(langevin_defense, spec, norm, count):
    images, labels, _ = world(count)
    attack = PGD(
        threat=ThreatModel(norm=norm, eps=0.05), steps=2, replicates=2, gradient=make_gradient(spec)
    )
    adversarial = attack(langevin_defense(), images, labels)
    assert adversarial.shape == images.shape
    assert bool((attack.threat.size(adversarial, images) <= 0.05 + 1e-9).all())
    assert spec.partition("(")[0] in GRADIENTS


def test_gradients_are_made_from_their_names_and_settings():
    assert make_gradient("bpda") == Identity()
    assert make_gradient("full(store='checkpoints', memory=2)") == Full(
        store="checkpoints", memory=2
    )
    assert make_gradient("smoothed(width=0.5, stride=2)") == Smoothed(width=0.5, stride=2)
    surrogate = make_gradient("surrogate(steps=5, through='smoothed')")
    assert surrogate == Surrogate(steps=5, through=Smoothed())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("magic", "unknown gradient 'magic'"),
        ("full(depth=3)", "takes no 'depth'"),
        ("smoothed(width)", "plain values"),
        ("smoothed(width='wide')", "must be a number"),
        ("smoothed(stride=-1)", "stride"),
        ("surrogate(steps=5, through='magic')", "unknown gradient"),
    ],
)
def test_wrong_names_and_settings_are_named(spec, said):
    with pytest.raises(UsageError, match=said):
        make_gradient(spec)
