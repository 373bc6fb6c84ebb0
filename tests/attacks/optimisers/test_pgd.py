"""PGD does exactly what it says: closed forms, a reference of its own, and the judge's word."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import PGD, Identity, ThreatModel
from ebm_defense.defense import as_defense
from ebm_defense.noise import KeyedNoise

EPS = 0.05


def images_and_labels(count=4, size=8, classes=2, inside=0.0):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((count, 1, size, size), generator=generator, dtype=torch.float64)
    return inside + (1 - 2 * inside) * images, torch.arange(count) % classes


def pgd(norm="Linf", **options):
    budget = {"steps": 3, "step_size": 0.02, "replicates": 2}
    return PGD(threat=ThreatModel(norm=norm, eps=EPS), **(budget | options))


def weight(size=8):
    return torch.randn((1, size, size), generator=torch.Generator().manual_seed(2)).double()


@pytest.fixture
def linear(two_class):
    return two_class(weight())


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
def test_on_a_linear_classifier_pgd_attains_the_worst_case(linear, norm, dual, random_start):
    images, labels = images_and_labels(inside=EPS)
    attack = pgd(norm, steps=12, step_size=10 * EPS, random_start=random_start)
    sign = 2.0 * labels - 1.0
    drop = sign * (linear.margin(images) - linear.margin(attack(linear, images, labels)))
    worst = EPS * torch.linalg.vector_norm(linear.weight, dual)
    torch.testing.assert_close(drop, worst.expand_as(drop), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_every_step_has_the_length_it_is_given(linear, listen, norm):
    images, labels = images_and_labels(inside=EPS)
    heard, attack = listen(), pgd(norm, steps=2, random_start=False)
    attack.run(as_defense(linear), images, labels, ids=range(4), seed=0, judge=heard)
    sizes = [attack.threat.size(p.images, images) for p in heard.proposals]
    for step, size in enumerate(sizes):
        torch.testing.assert_close(size, torch.full_like(size, step * attack.step_size))


@dataclass(frozen=True)
class Recorder(Identity):
    """BPDA that remembers the chain keys of every look."""

    keys: list = field(default_factory=list)

    def __call__(self, defense, images, labels, keys, loss):
        self.keys.append(keys)
        return super().__call__(defense, images, labels, keys, loss)


def reference_chain(purifier, image, key):
    settings, noise = purifier.settings, KeyedNoise(key.view(1))
    y = 2.0 * image - 1.0
    for k in range(settings.steps):
        y = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(purifier.energy(y[None]).sum() / settings.temperature, y)
        y = y - settings.step_size**2 / 2 * slope
        y = y + settings.step_size * noise.normal(k, y[None].detach())[0]
    return (y.detach() + 1.0) / 2.0


def reference_gradient(defense, image, label, keys):
    purified = torch.stack([reference_chain(defense.purifier, image, key) for key in keys])
    purified.requires_grad_()
    F.cross_entropy(defense.classifier(purified).mean(0), label).backward()
    return purified.grad.sum(0)


def reference_step(x, origin, gradient, attack):
    if attack.threat.norm == "Linf":
        moved = x + attack.step_size * gradient.sign()
        near = torch.minimum(torch.maximum(moved, origin - EPS), origin + EPS)
    else:
        delta = x + attack.step_size * gradient / gradient.norm() - origin
        near = origin + delta * min(1.0, EPS / float(delta.norm()))
    return near.clamp(0.0, 1.0)


def reference_iterates(defense, start, image, label, attack, keys):
    iterates = [start]
    for step in range(attack.steps):
        gradient = reference_gradient(defense, iterates[-1], label, keys[step])
        iterates.append(reference_step(iterates[-1], image, gradient, attack))
    return torch.stack(iterates)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_iterates_are_those_of_an_independent_bpda_eot_pgd(langevin_defense, listen, norm):
    defense, heard, recorder = langevin_defense(), listen(), Recorder()
    attack = pgd(norm, steps=4, replicates=3, gradient=recorder)
    images, labels = images_and_labels(count=3, classes=3)
    last = attack.run(defense, images, labels, ids=[5, 6, 7], seed=3, judge=heard)
    found = torch.stack([p.images for p in heard.proposals], dim=1)
    for row in range(3):
        keys = [k[:, row] for k in recorder.keys]
        expected = reference_iterates(
            defense, found[row, 0], images[row], labels[row], attack, keys
        )
        torch.testing.assert_close(found[row], expected, rtol=0.0, atol=1e-12)
    assert torch.equal(last, found[:, -1])


def test_the_judge_is_shown_the_logits_of_the_very_images(langevin_defense, listen):
    defense, heard, recorder = langevin_defense(), listen(), Recorder()
    images, labels = images_and_labels(classes=3)
    attack = pgd(gradient=recorder)
    attack.run(defense, images, labels, ids=range(4), seed=0, judge=heard)
    for proposal, keys in zip(heard.proposals, recorder.keys, strict=False):
        expected = defense.replicate_logits(proposal.images, keys).detach()
        torch.testing.assert_close(proposal.logits, expected)


def test_an_image_is_attacked_alike_alone_and_in_a_batch(langevin_defense):
    defense, attack = langevin_defense(), pgd()
    images, labels = images_and_labels(classes=3)
    together = attack.run(defense, images, labels, ids=[4, 5, 6, 7], seed=0)
    alone = attack.run(defense, images[2:3], labels[2:3], ids=[6], seed=0)
    torch.testing.assert_close(alone, together[2:3], rtol=0.0, atol=1e-12)


def test_the_same_seed_repeats_an_attack_and_another_does_not(langevin_defense):
    defense, attack = langevin_defense(), pgd()
    images, labels = images_and_labels(classes=3)
    first, again, other = (attack(defense, images, labels, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_attack_leaves_the_global_generator_alone(langevin_defense):
    images, labels = images_and_labels(classes=3)
    before = torch.get_rng_state()
    pgd()(langevin_defense(), images, labels)
    assert torch.equal(torch.get_rng_state(), before)


def spied(counting_purifier, linear, **options):
    return PurifiedClassifier(linear, counting_purifier, replicates=1, **options)


def test_a_struck_image_costs_nothing_more(linear, counting_purifier, listen):
    defense = spied(counting_purifier, linear)
    images, labels = images_and_labels()
    heard = listen({1: [0, 2]})
    pgd(steps=3).run(defense, images, labels, ids=range(4), seed=0, judge=heard)
    assert counting_purifier.rows == [8, 8, 4, 4]
    assert [p.rows.tolist() for p in heard.proposals] == [[0, 1, 2, 3]] * 2 + [[1, 3]] * 2


def test_a_struck_image_stays_where_it_was_struck(linear, listen):
    images, labels = images_and_labels()
    heard = listen({1: [2]})
    defense = as_defense(linear)
    last = pgd(steps=3).run(defense, images, labels, ids=range(4), seed=0, judge=heard)
    assert torch.equal(last[2], heard.proposals[1].images[2])


def test_an_attack_ends_when_every_image_is_struck(linear, counting_purifier, listen):
    defense = spied(counting_purifier, linear)
    images, labels = images_and_labels()
    heard = listen({0: [0, 1, 2, 3]})
    pgd(steps=5).run(defense, images, labels, ids=range(4), seed=0, judge=heard)
    assert counting_purifier.rows == [8]
    assert len(heard.proposals) == 1


def test_the_cost_that_is_announced_is_the_cost_that_is_spent(linear, counting_purifier):
    defense, attack = spied(counting_purifier, linear), pgd(steps=3)
    images, labels = images_and_labels()
    attack.run(defense, images, labels, ids=range(len(images)), seed=0)
    spent = sum(counting_purifier.rows) * counting_purifier.chain_steps
    assert spent == len(images) * attack.chain_steps(defense)


def test_a_deterministic_defense_is_looked_at_once_a_step(linear, listen):
    images, labels = images_and_labels()
    heard = listen()
    attack = pgd(replicates=9)
    attack.run(as_defense(linear), images, labels, ids=range(4), seed=0, judge=heard)
    assert {len(p.logits) for p in heard.proposals} == {1}


def test_without_steps_only_the_start_is_proposed(langevin_defense, listen):
    images, labels = images_and_labels(classes=3)
    heard = listen()
    attack = pgd(steps=0, random_start=False)
    last = attack.run(langevin_defense(), images, labels, ids=range(4), seed=0, judge=heard)
    assert [p.step for p in heard.proposals] == list(range(attack.looks)) == [0]
    assert torch.equal(last, images)


def test_there_are_as_many_looks_as_announced(linear, listen):
    images, labels = images_and_labels()
    heard, attack = listen(), pgd(steps=5)
    attack.run(as_defense(linear), images, labels, ids=range(4), seed=0, judge=heard)
    assert [p.step for p in heard.proposals] == list(range(attack.looks))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("count", [0, 1])
def test_batches_of_one_and_of_none_are_attacked(langevin_defense, norm, count):
    images, labels = images_and_labels(count=count, classes=3)
    adversarial = pgd(norm)(langevin_defense(), images, labels)
    assert adversarial.shape == images.shape


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"replicates": 0}, {"step_size": 0.0}, {"step_size": float("nan")}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError):
        pgd(**wrong)


def test_a_plain_call_attacks_any_classifier_and_leaves_the_originals_alone(linear):
    images, labels = images_and_labels()
    kept, attack = images.clone(), pgd()
    adversarial = attack(linear.forward, images, labels)
    assert torch.equal(images, kept)
    assert bool((attack.threat.size(adversarial, images) <= EPS + 1e-9).all())
    assert float(adversarial.min()) >= 0.0
    assert float(adversarial.max()) <= 1.0


def test_a_plain_call_works_under_no_grad(langevin_defense):
    images, labels = images_and_labels(classes=3)
    defense, attack = langevin_defense(), pgd()
    with torch.no_grad():
        quiet = attack(defense, images, labels)
    assert torch.equal(quiet, attack(defense, images, labels))


@pytest.mark.parametrize("scale", [255.0, float("nan")])
def test_a_plain_call_refuses_images_off_the_scale(linear, scale):
    images, labels = images_and_labels()
    with pytest.raises(UsageError):
        pgd()(linear, images * scale, labels)


def test_a_plain_call_refuses_labels_that_do_not_fit(linear):
    images, labels = images_and_labels()
    with pytest.raises(UsageError):
        pgd()(linear, images, labels[:-1])


def test_an_attack_works_on_a_classifier_with_dropout_and_batch_norm():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)
        ).double()
    images, labels = images_and_labels()
    first, again = (pgd()(network, images, labels) for _ in range(2))
    assert torch.equal(first, again)
