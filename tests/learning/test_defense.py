"""Whole defenses learn what they should, leave frozen parts alone, and go on where they stopped."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense.attacks.training import InputPerturbation
from ebm_defense.classifiers import normalized
from ebm_defense.data import Images
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.batches import Batches, generator_of
from ebm_defense.learning.defenses.chain import LearnedChain
from ebm_defense.learning.defenses.objectives import Objective, cross_entropy, divergence, margin
from ebm_defense.learning.defenses.recipe import DefenseRecipe
from ebm_defense.learning.defenses.synthesis import synthesise
from ebm_defense.learning.defenses.trainer import MOST_SKIPPED, DefenseTrainer
from ebm_defense.learning.energies.likelihood import Likelihood
from ebm_defense.learning.energies.trainer import DivergedError
from ebm_defense.learning.parallel import Team
from ebm_defense.networks import ResNet, ResNetSettings
from ebm_defense.noise import GeneratorNoise, KeyedNoise, chain_keys
from ebm_defense.purifiers import LangevinPurifier
from ebm_defense.purifiers.baselines import BitDepth, GaussianNoise, NoPurifier

CHAIN = LangevinSettings(steps=2, step_size=0.05, temperature=0.00125)


def data_of(count: int = 40) -> Images:
    """Two classes that differ in the mean of the left half."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    images[..., :4] += 0.4 * labels[:, None, None, None]
    return Images(images, labels)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return normalized(ResNet(ResNetSettings(channels=1, classes=2, stem=2)), 0.5, 0.5)


def chain(**options) -> LearnedChain:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = ConvEnergySettings(channels=1, image_size=8, width=2, activation="silu")
        return LearnedChain(ConvEnergy(settings), CHAIN, **options)


def trainer_of(purifier=None, classifiers=None, *, adversary=None, team=None, **recipe):
    given = {"updates": 6, "batch": 10, "validate_every": 3, "validation_steps": 2} | recipe
    size = given.pop("batch")
    data = data_of()
    return DefenseTrainer(
        chain(learn_drift=True) if purifier is None else purifier,
        [network()] if classifiers is None else classifiers,
        Batches(data=data, size=size, padding=0, flip=False),
        data,
        DefenseRecipe(**given),
        adversary or InputPerturbation(),
        precision="fp32",
        team=team,
    )


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# What learns, and what does not


def test_frozen_classifiers_stay_as_they_are_with_their_batch_statistics():
    classifiers = [network(0).train(), network(1)]
    before = [values(c) for c in classifiers]
    trainer = trainer_of(classifiers=classifiers)
    energy = values(trainer.purifier)
    list(trainer.run())
    assert all(same(values(c), b) for c, b in zip(classifiers, before, strict=True))
    assert not any(c.training for c in classifiers)
    changed = {k for k, v in values(trainer.purifier).items() if not torch.equal(v, energy[k])}
    assert "log_drift" in changed
    assert "log_noise" not in changed
    assert any(k.startswith("energy.") for k in changed)


def test_both_learn_and_batch_statistics_with_them():
    trainer = trainer_of(learn="both")
    before = values(trainer.learned)
    list(trainer.run())
    after = values(trainer.learned)
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"purifier", "classifier"}
    assert any("running_mean" in k and not torch.equal(before[k], after[k]) for k in before)


def test_every_classifier_has_its_turn():
    calls = []

    class Listening(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.dense = name, nn.Linear(64, 2)

        def forward(self, x):
            calls.append(self.name)
            return self.dense(x.flatten(1))

    trainer = trainer_of(classifiers=[Listening("a"), Listening("b")], updates=12)
    for _ in range(12):
        trainer.step()
    assert {*calls} == {"a", "b"}


def test_with_eps_zero_and_no_purifier_it_is_ordinary_training():
    trainer = trainer_of(NoPurifier(), learn="classifier", eps=0.0, average=0.0, clip=1e9)
    expected = copy.deepcopy(trainer.classifiers[0])
    optimiser = torch.optim.AdamW(
        expected.parameters(), lr=trainer.recipe.classifier_lr, betas=(0.9, 0.99), weight_decay=0.02
    )
    for update in range(6):
        images, labels = trainer.batches.at(update)
        for group in optimiser.param_groups:
            group["lr"] = trainer.recipe.classifier_lr * trainer.recipe.rate(update)
        expected.train()
        optimiser.zero_grad()
        F.cross_entropy(expected(images), labels).backward()
        optimiser.step()
        trainer.step()
    found = values(trainer.learned["classifier"])
    for key, value in values(expected).items():
        torch.testing.assert_close(found[key], value)


def test_learning_raises_accuracy_under_attack():
    trainer = trainer_of(NoPurifier(), learn="classifier", updates=60, validate_every=30, eps=0.05)
    history = list(trainer.run())
    assert history[-1].robust > 0.9
    assert history[-1].attacked > history[0].attacked or history[0].attacked > 0.95


def test_the_best_weights_are_kept():
    trainer = trainer_of(NoPurifier(), learn="classifier", updates=4, validate_every=1)
    found = iter([0.2, 0.9, 0.4, 0.3])
    trainer._accuracies = lambda: (1.0, next(found))
    kept = []
    for _ in trainer.run():
        kept.append(values(trainer.averaged.module))
    assert same(trainer.best, kept[1])


def test_reconstruction_draws_purified_images_to_the_originals():
    near, far = (trainer_of(reconstruction=a, updates=15, average=0.0) for a in (100.0, 0.0))
    distances = []
    for trainer in (near, far):
        with torch.no_grad():
            trainer.purifier.energy.f[0].weight *= 3  # a drift to take back
        list(trainer.run())
        images = data_of().images
        noise = KeyedNoise(chain_keys(0, "test", range(len(images)), range(1))[0])
        with torch.no_grad():
            distances.append(float((trainer.purifier.purify(images, noise) - images).norm()))
    assert distances[0] < distances[1]


def test_a_robust_reconstruction_is_the_mean_square_near_zero_and_less_far_off():
    apart = torch.tensor([0.001, -0.02, 0.9])
    square, cauchy = (trainer_of(reconstruction=1.0, reconstruction_shape=a) for a in (2.0, 0.0))
    torch.testing.assert_close(square._apart(apart), apart.square().mean())
    torch.testing.assert_close(
        cauchy._apart(apart[:1]), apart[:1].square().mean(), rtol=1e-3, atol=0
    )
    assert float(cauchy._apart(apart)) < 0.2 * float(square._apart(apart))
    with pytest.raises(UsageError, match="shape of at most 2"):
        DefenseRecipe(reconstruction_shape=3.0)


# The chain


def test_the_learned_chain_is_the_langevin_purifiers():
    learned = chain()
    with torch.no_grad():
        learned.log_drift += 0.2
    s = learned.settings
    plain = LangevinPurifier(learned.energy, s.steps, s.step_size, s.temperature, precision="fp32")
    images = data_of(6).images
    noise = KeyedNoise(chain_keys(0, "test", range(6), range(1))[0])
    with torch.no_grad():
        torch.testing.assert_close(learned.purify(images, noise), plain.purify(images, noise))


def test_the_chains_derivative_is_that_of_finite_differences():
    learned = chain(learn_drift=True, learn_noise=True).double()
    images = data_of(2).images.double()
    noise = KeyedNoise(chain_keys(0, "test", range(2), range(1))[0])
    weight = images.flip(0).flip(-1)
    (learned.purify(images, noise) * weight).sum().backward()
    for parameter in (learned.log_drift, learned.log_noise, learned.energy.f[0].bias):
        found, flat = parameter.grad.flatten()[0], parameter.data.view(-1)
        ends = []
        for h in (1e-5, -2e-5):
            flat[0] += h
            with torch.no_grad():
                ends.append((learned.purify(images, noise) * weight).sum())
        assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(float(found), rel=1e-6, abs=1e-9)
        flat[0] += 1e-5


# Going on


@pytest.mark.parametrize("learn", ["energy", "both"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(learn, tmp_path):
    options = {"learn": learn, "likelihood": Likelihood(weight=0.01, bank=8, batch=4), "draws": 2}
    whole = trainer_of(**options)
    history = list(whole.run())
    first = trainer_of(**options)
    for _ in first.run():
        first.save(tmp_path / "checkpoint.pt")
        break
    assert first.done == 3
    second = trainer_of(**options)
    second.load(tmp_path / "checkpoint.pt")
    list(second.run())
    assert second.history == history
    assert same(values(second.learned), values(whole.learned))
    assert same(values(second.averaged), values(whole.averaged))
    assert same(second.best, whole.best)
    assert torch.equal(second.likelihood.start.bank, whole.likelihood.start.bank)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    trainer_of().save(tmp_path / "checkpoint.pt")
    with pytest.raises(UsageError, match="begun with learn energy"):
        trainer_of(learn="both").load(tmp_path / "checkpoint.pt")
    wider = LearnedChain(ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=3)), CHAIN)
    with pytest.raises(UsageError, match="no checkpoint of these networks"):
        trainer_of(wider).load(tmp_path / "checkpoint.pt")


def test_ten_bad_gradients_in_a_row_end_it_and_spoil_no_weight():
    def poison(predict, images, labels, **_):
        return images * float("nan")

    trainer = trainer_of(adversary=poison, updates=20)
    before = values(trainer.learned)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        list(trainer.run())
    assert trainer.skipped == MOST_SKIPPED
    assert same(values(trainer.learned), before)


# The parts of a batch


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    data = Images(torch.arange(12.0).view(12, 1, 1, 1) / 12, torch.arange(12))
    batches = Batches(data=data, size=4, padding=0, flip=False)
    epochs = [torch.cat([batches.at(3 * e + i).labels for i in range(3)]) for e in range(2)]
    assert all(torch.equal(e.sort().values, data.labels) for e in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_has_its_share_of_extra_images():
    data = data_of()
    extra = Images(torch.full((5, 1, 8, 8), 0.75), torch.full((5,), 7))
    batches = Batches(data=data, size=10, padding=0, flip=False, extra=extra, share=0.3)
    assert int((batches.at(0).labels == 7).sum()) == 3
    assert batches.at(0).images.shape == (10, 1, 8, 8)


def test_two_processes_share_a_batch_without_overlap():
    rows = torch.arange(7)
    shares = [Team(rank, 2).share(rows) for rank in range(2)]
    assert torch.equal(torch.cat(shares).sort().values, rows)


# Losses


def test_losses_in_closed_form():
    logits = torch.tensor([[2.0, 0.0, 1.5], [0.0, 3.0, 1.0]])
    labels = torch.tensor([0, 1])
    assert margin(logits, labels).tolist() == [0.5, 0.0]
    assert torch.allclose(divergence(logits, logits), torch.zeros(2), atol=1e-7)
    p, q = logits.softmax(1), logits.flip(0).softmax(1)
    expected = (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(divergence(logits, logits.flip(0)), expected, atol=1e-6)


def test_trades_without_weight_is_clean_training_and_a_share_mixes():
    clean, attacked = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    ce = [cross_entropy(z, labels).mean() for z in (clean, attacked)]
    assert torch.equal(Objective(loss="trades", beta=0.0)(clean, attacked, labels), ce[0])
    mixed = Objective(clean=0.25)(clean, attacked, labels)
    assert torch.allclose(mixed, 0.25 * ce[0] + 0.75 * ce[1])
    assert torch.equal(Objective()(None, attacked, labels), ce[1])


# The adversary


@pytest.mark.parametrize("steps", [1, 3])
def test_the_adversary_stays_within_eps_and_the_box_and_raises_the_loss(steps):
    classifier, data = network(), data_of()
    attacked = InputPerturbation()(
        classifier.eval(), *data, eps=0.1, steps=steps,
        loss=cross_entropy, generator=generator_of(0, "test"),
    )  # fmt: skip
    assert float((attacked - data.images).abs().max()) <= 0.1 + 1e-6
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0
    before, after = (cross_entropy(classifier(x), data.labels).sum() for x in (data[0], attacked))
    assert after > before


def test_the_attack_meets_the_whole_chain_with_fresh_noise():
    seen = []

    class Listening(LearnedChain):
        def purify(self, images, noise):
            assert isinstance(noise, GeneratorNoise)
            out = super().purify(images, noise)
            seen.append((images.requires_grad, out.detach()))
            return out

    base = chain()
    trainer = trainer_of(Listening(base.energy, CHAIN), attack_steps=(3,))
    trainer.step()
    assert [asked for asked, _ in seen] == [True, True, True, False]
    assert not torch.equal(seen[0][1], seen[1][1])


# More images


def test_synthetic_images_are_labelled_by_a_sure_teacher():
    data = data_of()

    def teacher(x):
        score = 40.0 * (x[..., :4].mean((1, 2, 3)) - x[..., 4:].mean((1, 2, 3)) - 0.2)
        return torch.stack([-score, score], 1)

    made = synthesise(data, GaussianNoise(0.05), teacher, count=60, agreement=0.9)
    assert 0 < len(made.labels) <= 60
    assert float(teacher(made.images).softmax(1).amax(1).min()) >= 0.9
    assert torch.equal(teacher(made.images).argmax(1), made.labels)
    with pytest.raises(UsageError, match="lower the agreement"):
        synthesise(data, NoPurifier(), lambda x: torch.zeros(len(x), 2), count=4, agreement=0.9)


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"learn": "everything"}, {"updates": 0}, {"attack_steps": ()}, {"attack_steps": (0,)},
        {"eps": -0.1}, {"average": 1.0}, {"warmup": 1.0}, {"lr": 0.0},
        {"learn": "classifier", "likelihood": Likelihood(weight=1.0)},
    ],
)  # fmt: skip
def test_recipes_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        DefenseRecipe(**wrong)


@pytest.mark.parametrize(
    ("purifier", "classifiers", "learn", "word"),
    [
        (NoPurifier(), 1, "energy", "no energy to learn"),
        (BitDepth(3), 1, "classifier", "no gradient"),
        (NoPurifier(), 2, "classifier", "one classifier learns"),
    ],
)
def test_parts_that_do_not_fit_are_refused(purifier, classifiers, learn, word):
    with pytest.raises(UsageError, match=word):
        trainer_of(purifier, [network(i) for i in range(classifiers)], learn=learn)


def test_stages_and_rates_follow_the_recipe():
    r = DefenseRecipe(updates=10, attack_steps=(1, 3), eps=0.3, eps_rise=0.5, warmup=0.2)
    assert [r.steps_at(u) for u in range(10)] == [1] * 5 + [3] * 5
    assert [round(r.eps_at(u), 3) for u in (0, 5, 9)] == [0.1, 0.3, 0.3]
    rates = [r.rate(u) for u in range(10)]
    assert rates[0] < rates[1] > rates[-1] > 0
    assert dataclasses.replace(r, warmup=0.0).rate(0) == 1.0
