"""Banks, energies and classifiers learn what they should, and go on where they stopped."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.data import load_data
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.learning.batches import shifted
from ebm_defense.learning.classifier import (
    ClassifierRecipe,
    ClassifierTrainer,
    accuracy,
)
from ebm_defense.learning.diagnosis.diagnostics import long_chains
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import DivergedError, EnergyTrainer
from ebm_defense.storage.files import save_state

quick = settings(
    deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int, shape=(1, 2, 2)) -> torch.Tensor:
    """Images that are their own number all over."""
    return torch.arange(float(count)).view(-1, 1, 1, 1).expand(count, *shape).clone()


# Learning an energy


class Gaussian(nn.Module):
    """U(x) = ½‖x − m‖² with a learnable mean, whose chains are known in closed form."""

    def __init__(self, mean: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.full((1, 2, 2), mean))

    def forward(self, x):
        return 0.5 * (x - self.mean).square().flatten(1).sum(1)


SPREAD = 0.2


def gaussian_images(count=2000) -> torch.Tensor:
    """Images whose pixels, in [-1, 1] units, have means ±0.4 and deviation 0.2.

    One in a thousand is cut off at three deviations, where [0, 1] ends.
    """
    mean = torch.tensor([0.4, -0.4, 0.4, -0.4]).view(1, 1, 2, 2)
    x = mean + SPREAD * torch.randn(count, 1, 2, 2, generator=seeded(0))
    return ((x + 1) / 2).clamp(0, 1)


def gaussian_recipe(**options) -> EnergyRecipe:
    # With temperature 0.04 and U of curvature 1 a converged chain has the data's deviation 0.2.
    chain = LangevinSettings(steps=10, step_size=0.1, temperature=SPREAD**2)
    base = {
        "updates": 200, "batch": 100, "bank": 400, "langevin": chain, "data_noise": 0.0,
        "adam_lr": 0.02, "final_lr": 2e-4, "fresh": "noise", "average": 0.9,
    }  # fmt: skip
    return EnergyRecipe(**(base | options))


def bank_of(trainer: EnergyTrainer) -> torch.Tensor:
    return trainer.objective.start.bank


@pytest.fixture(scope="module")
def learned():
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), gaussian_recipe())
    updates = list(trainer.run())
    return trainer, updates


def test_maximum_likelihood_finds_the_data_mean(learned):
    trainer, _ = learned
    target = gaussian_images().mean(0) * 2 - 1
    # The weights rest where data and chains have one mean. A batch of each misses that by
    # 0.2·sqrt(2/100) = 0.028 (one standard deviation), and the falling rate only averages it.
    tolerance = 3 * SPREAD * math.sqrt(2 / 100)
    assert float((trainer.energy.mean - target).abs().max().detach()) < tolerance
    assert float((trainer.averaged.module.mean - target).abs().max().detach()) < tolerance


def test_the_chains_of_a_learned_energy_look_like_the_data(learned):
    bank = bank_of(learned[0]).flatten(1)
    data = gaussian_images().flatten(1) * 2 - 1
    assert float((bank.mean(0) - data.mean(0)).abs().max()) < 0.08
    assert abs(float(bank.std(0).mean()) / SPREAD - 1) < 0.2


def test_updates_are_numbered_and_their_difference_dies_out(learned):
    _, updates = learned
    assert [u.number for u in updates] == list(range(1, 201))
    late = torch.tensor([u.energy_difference for u in updates[-50:]])
    assert abs(float(late.mean())) < 0.2 * abs(updates[0].energy_difference)


def test_gradient_strength_is_the_mean_drift_in_displacement_units():
    trainer = EnergyTrainer(
        Gaussian(5.0),
        gaussian_images(50),
        gaussian_recipe(
            langevin=LangevinSettings(steps=1, step_size=1e-3), bank=50, batch=50, limit=1e6
        ),
        precision="fp32",
    )
    drift = LangevinSettings(step_size=1e-3).drift
    expected = drift * (bank_of(trainer) - 5.0).flatten(1).norm(dim=1).mean()
    # The one batch is the whole bank, which rejuvenation has renewed here and there.
    update = next(trainer.run())
    assert abs(update.gradient_strength / float(expected) - 1) < 0.05


@pytest.mark.parametrize("target", [0.4, -0.4])
def test_the_first_update_moves_the_mean_towards_the_data(target):
    images = torch.full((10, 1, 2, 2), (target + 1) / 2)
    trainer = EnergyTrainer(Gaussian(0.0), images, gaussian_recipe(rejuvenation=0.0))
    next(trainer.run())
    assert bool((trainer.energy.mean * target > 0).all())


def test_one_sgd_update_is_the_likelihood_gradient():
    recipe = gaussian_recipe(sgd_from=1, sgd_lr=0.5, updates=2, rejuvenation=0.0)
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), recipe, precision="fp32")
    run = trainer.run()
    next(run)
    before = trainer.energy.mean.detach().clone()
    batch = trainer._batch(1, 100)
    states = trainer.objective.start.draw(batch)
    negative = run_chain(
        states, batch.draws.noise("chains"), energy=trainer.energy, settings=recipe.langevin
    )
    positive = batch.noisy(0.0)
    update = next(run)
    # ∂/∂m [mean U(x⁺) − mean U(x⁻)] = mean x⁻ − mean x⁺; the two temperatures cancel.
    expected = before - 0.5 * (negative.mean(0) - positive.mean(0))
    torch.testing.assert_close(trainer.energy.mean.detach(), expected, rtol=1e-4, atol=1e-5)
    difference = 0.5 * (positive - before).square().flatten(1).sum(1).mean()
    difference -= 0.5 * (negative - before).square().flatten(1).sum(1).mean()
    assert math.isclose(
        update.energy_difference, float(difference) / SPREAD**2, rel_tol=1e-3, abs_tol=1e-4
    )


def test_positives_carry_the_data_noise():
    recipe = gaussian_recipe(data_noise=0.7)
    trainer = EnergyTrainer(Gaussian(), torch.full((5, 1, 2, 2), 0.5), recipe)
    seen = []
    trainer.energy.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    next(trainer.run())
    # The network sees both halves at once, the data first.
    positive = seen[-1][: recipe.batch]
    assert abs(float(positive.std()) / 0.7 - 1) < 0.2


def test_visited_chains_are_written_back_and_the_others_wait():
    recipe = gaussian_recipe(batch=10, bank=50, rejuvenation=0.0)
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), recipe)
    before = bank_of(trainer).clone()
    next(trainer.run())
    moved = (bank_of(trainer) != before).flatten(1).any(1)
    assert int(moved.sum()) == 10


def test_the_running_average_follows_the_weights():
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), gaussian_recipe(average=0.5, updates=3))
    weights = []
    for _ in trainer.run():
        weights.append(trainer.energy.mean.detach().clone())
    expected = 0.5 * (0.5 * (weights[0] + weights[1]) + weights[2])
    torch.testing.assert_close(trainer.averaged.module.mean.detach(), expected)


def test_adams_rate_falls_from_first_to_last():
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), gaussian_recipe(updates=10))
    rates = [trainer.optimiser.param_groups[0]["lr"] for _ in trainer.run()]
    assert math.isclose(rates[0], 0.02)
    assert rates == sorted(rates, reverse=True)
    assert 2e-4 < rates[-1] < 1.5e-3


def test_sgd_takes_over_from_the_stated_update():
    recipe = gaussian_recipe(updates=6, sgd_from=3, sgd_lr=0.1)
    trainer = EnergyTrainer(Gaussian(), gaussian_images(), recipe)
    kinds = [(type(trainer.optimiser).__name__, u.number) for u in trainer.run()]
    assert kinds == [("Adam", 1), ("Adam", 2), ("Adam", 3), ("SGD", 4), ("SGD", 5), ("SGD", 6)]
    group = trainer.optimiser.param_groups[0]
    assert math.isclose(group["lr"], 0.1 * SPREAD**2)
    assert (group["momentum"], group["weight_decay"]) == (0, 0)


# Going on


def conv_trainer(**options) -> EnergyTrainer:
    torch.manual_seed(0)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    chain = LangevinSettings(steps=3, step_size=0.05, temperature=1e-2)
    base = {
        "updates": 8, "batch": 5, "bank": 20, "langevin": chain, "adam_lr": 1e-2,
        "rejuvenation": 0.3, "sgd_from": 5,
    }  # fmt: skip
    images = load_data("digits", "train").images[:60]
    return EnergyTrainer(energy, images, EnergyRecipe(**(base | options)))


def same_state(a, b) -> bool:
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return bool(a == b)


def energy_state(trainer: EnergyTrainer) -> dict:
    return {
        "energy": dict(trainer.energy.state_dict()),
        "averaged": dict(trainer.averaged.state_dict()),
        "optimiser": trainer.optimiser.state_dict(),
        "bank": bank_of(trainer),
        "history": list(map(tuple, trainer.history)),
    }


# 0: before the first update; 3: in Adam's part; 5: at the change to SGD; 7: after it; 8: done.
@pytest.mark.parametrize("stop", [0, 3, 5, 7, 8])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, stop):
    whole = conv_trainer()
    updates = list(whole.run())

    first = conv_trainer()
    run = first.run()
    for _ in range(stop):
        next(run)
    first.save(tmp_path / "state.pt")

    second = conv_trainer()
    bank_of(second).zero_()
    for p in second.energy.parameters():
        nn.init.zeros_(p)
    second.load(tmp_path / "state.pt")
    assert second.done == stop
    assert list(second.run()) == updates[stop:]
    assert same_state(energy_state(second), energy_state(whole))


def test_saving_does_not_change_the_run(tmp_path):
    saved, whole = conv_trainer(), conv_trainer()
    list(whole.run())
    for _ in saved.run():
        saved.save(tmp_path / "state.pt")
    assert same_state(energy_state(saved), energy_state(whole))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_the_global_generator_does_not_steer_learning():
    whole, other = conv_trainer(), conv_trainer()
    list(whole.run())
    torch.manual_seed(77)
    list(other.run())
    assert same_state(energy_state(whole), energy_state(other))


@pytest.mark.parametrize("content", [{"x": 1}, [1, 2], {"energy": {}}, torch.ones(3)])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    save_state(tmp_path / "other.pt", content)
    with pytest.raises(UsageError, match=r"other\.pt is no checkpoint"):
        conv_trainer().load(tmp_path / "other.pt")


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    conv_trainer().save(tmp_path / "state.pt")
    gaussian = EnergyTrainer(Gaussian(), gaussian_images(), gaussian_recipe())
    with pytest.raises(
        UsageError, match="begun with network ConvEnergy, and cannot go on with network Gaussian"
    ):
        gaussian.load(tmp_path / "state.pt")


@pytest.mark.parametrize("change", ["seed", "activation"])
def test_a_checkpoint_that_would_go_on_as_something_else_is_refused(tmp_path, change):
    """Neither shows in shapes: another seed does nothing, another activation mixes two energies."""
    conv_trainer().save(tmp_path / "state.pt")
    other = conv_trainer(seed=7) if change == "seed" else conv_trainer()
    if change == "activation":
        shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation="soft_lrelu")
        other.energy = ConvEnergy(shape)
    with pytest.raises(UsageError, match=f"begun with {change}"):
        other.load(tmp_path / "state.pt")
    classifier_trainer().save(tmp_path / "classifier.pt")
    data = load_data("digits", "train")
    trainer = ClassifierTrainer(small_classifier(), *data, ClassifierRecipe(seed=7))
    with pytest.raises(UsageError, match="begun with seed 0, and cannot go on with seed 7"):
        trainer.load(tmp_path / "classifier.pt")


def test_a_checkpoint_of_another_bank_is_refused(tmp_path):
    conv_trainer(bank=10).save(tmp_path / "state.pt")
    with pytest.raises(UsageError, match="no checkpoint of this network and recipe"):
        conv_trainer(bank=20).load(tmp_path / "state.pt")


def test_an_absent_or_truncated_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        conv_trainer().load(tmp_path / "none.pt")
    conv_trainer().save(tmp_path / "state.pt")
    content = (tmp_path / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="truncated"):
        conv_trainer().load(tmp_path / "state.pt")


# Divergence


class Bomb(nn.Module):
    """A tame energy that turns bad after some weight updates."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.updates = kind, 0
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        size = x.square().flatten(1).sum(1)
        if self.updates < 3:
            return self.weight * size
        bad = {"explode": -1e3 * size, "nan": math.nan * size, "cliff": 1e9 * x.flatten(1).sum(1)}
        return self.weight * bad[self.kind]


@pytest.mark.parametrize("kind", ["explode", "nan", "cliff"])
def test_divergence_stops_with_the_last_good_weights(kind):
    recipe = gaussian_recipe(langevin=LangevinSettings(steps=5, step_size=0.1, temperature=0.1))
    trainer = EnergyTrainer(Bomb(kind), gaussian_images(), recipe)
    run = trainer.run()
    for _ in range(3):
        next(run)
    trainer.energy.updates = 3
    weight, averaged, bank = (
        t.detach().clone()
        for t in (trainer.energy.weight, trainer.averaged.module.weight, bank_of(trainer))
    )
    with pytest.raises(DivergedError, match="diverged at update 4"):
        next(run)
    assert torch.equal(trainer.energy.weight.detach(), weight)
    assert torch.equal(trainer.averaged.module.weight.detach(), averaged)
    assert torch.equal(bank_of(trainer), bank)
    assert trainer.done == 3
    assert all(math.isfinite(u.energy_difference) for u in trainer.history)


def test_divergence_can_be_saved_and_gone_on_from(tmp_path):
    trainer = EnergyTrainer(Bomb("nan"), gaussian_images(), gaussian_recipe())
    trainer.energy.updates = 3
    with pytest.raises(DivergedError):
        list(trainer.run())
    trainer.save(tmp_path / "state.pt")
    again = EnergyTrainer(Bomb("nan"), gaussian_images(), gaussian_recipe())
    again.load(tmp_path / "state.pt")
    assert math.isfinite(next(again.run()).energy_difference)


# Recipes


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 11, "bank": 10}, "batch"),
        ({"rejuvenation": -0.1}, "rejuvenation"),
        ({"rejuvenation": 1.1}, "rejuvenation"),
        ({"rejuvenation": math.nan}, "rejuvenation"),
        ({"average": 1.0}, "average"),
        ({"average": -0.1}, "average"),
        ({"updates": 0}, "updates"),
        ({"sgd_from": -1}, "sgd_from"),
        ({"langevin": LangevinSettings(steps=0)}, "steps"),
    ],
)
def test_bad_energy_recipes_are_refused_by_name(bad, word):
    with pytest.raises(UsageError, match=word):
        EnergyRecipe(**bad)


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch": 0}, "batch"),
        ({"copies": 0}, "copies"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"padding": -1}, "padding"),
    ],
)
def test_bad_classifier_recipes_are_refused_by_name(bad, word):
    with pytest.raises(UsageError, match=word):
        ClassifierRecipe(**bad)


# Images on another scale

SCALES = {
    "bytes": lambda x: (x * 255).byte(),
    "0 to 255": lambda x: x * 255,
    "-1 to 1": lambda x: x * 2 - 1,
    "NaN": lambda x: x * float("nan"),
    "no images": lambda x: x[:0],
}


@pytest.mark.parametrize("scale", SCALES)
def test_no_trainer_learns_from_images_on_another_scale(scale):
    images = SCALES[scale](load_data("digits", limit=20).images)
    labels = torch.zeros(len(images), dtype=torch.int64)
    energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    with pytest.raises(UsageError, match="training images"):
        EnergyTrainer(energy, images, EnergyRecipe(batch=2, bank=4))
    with pytest.raises(UsageError, match="training images"):
        ClassifierTrainer(small_classifier(), images, labels, ClassifierRecipe())


@pytest.mark.parametrize("scale", ["bytes", "0 to 255", "NaN"])
def test_copies_on_another_scale_are_refused_before_they_are_learned(scale):
    trainer = classifier_trainer(images=lambda _: SCALES[scale](load_data("digits").images[:200]))
    before = [p.clone() for p in trainer.classifier.parameters()]
    with pytest.raises(UsageError, match="training images"):
        next(trainer.run())
    assert all(map(torch.equal, before, trainer.classifier.parameters()))


def test_labels_unlike_the_images_are_refused():
    images = load_data("digits").images[:20]
    with pytest.raises(UsageError, match="labels must be 20 integers"):
        ClassifierTrainer(small_classifier(), images, torch.zeros(19).long(), ClassifierRecipe())


# Modes


class Fickle(nn.Module):
    """An energy with batch statistics, dropout and a spectral norm, all of which modes change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.utils.spectral_norm(nn.Conv2d(1, 4, 3, 2))
        self.norm, self.drop, self.line = nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Linear(4, 1)

    def forward(self, x):
        return self.line(self.drop(self.norm(self.conv(x)).mean((2, 3))))[:, 0]


def test_chains_are_of_one_energy_whatever_its_mode_which_stays():
    """Chains of learning sample the energy in evaluation; the weights' update keeps its mode."""
    modes = []
    energy = Fickle()
    energy.register_forward_hook(lambda module, *_: modes.append(module.drop.training))
    chain = LangevinSettings(steps=3, step_size=0.05, temperature=1e-2)
    recipe = EnergyRecipe(updates=1, batch=4, bank=8, langevin=chain)
    trainer = EnergyTrainer(energy, load_data("digits", limit=20).images, recipe, "fp32")
    list(trainer.run())
    assert modes == [False] * (len(modes) - 1) + [True]
    assert len(modes) >= 4
    assert all(module.training for module in energy.modules())


def test_looking_at_a_model_changes_neither_its_mode_nor_its_buffers():
    energy, images = Fickle(), load_data("digits", limit=8).images
    classifier = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 10))
    before = {k: v.clone() for m in (energy, classifier) for k, v in m.state_dict().items()}
    settings = LangevinSettings(steps=2, step_size=0.05, temperature=1e-2)
    first, again = (long_chains(energy, images * 2 - 1, settings, (2,), 0)[2] for _ in range(2))
    assert torch.equal(first, again)
    labels = torch.zeros(8, dtype=torch.int64)
    assert accuracy(classifier, images, labels) == accuracy(classifier, images, labels)
    after = {k: v for m in (energy, classifier) for k, v in m.state_dict().items()}
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert energy.training
    assert classifier.training


# Learning a classifier


def small_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = WideResNetSettings(channels=1, classes=10, depth=10, widen=1)
    return normalized(WideResNet(shape), 0.5, 0.5)


def classifier_trainer(seed=0, images=None, **options) -> ClassifierTrainer:
    data = load_data("digits", "train")
    base = {"epochs": 4, "batch": 50, "padding": 1, "flip": False}
    images = data.images[:200] if images is None else images
    return ClassifierTrainer(
        small_classifier(seed), images, data.labels[:200], ClassifierRecipe(**(base | options))
    )


def test_a_classifier_learns_the_digits():
    train, test = load_data("digits", "train"), load_data("digits", "test")
    recipe = ClassifierRecipe(epochs=4, batch=50, padding=0, flip=False)
    classifier = small_classifier()
    before = accuracy(classifier.eval(), *test)
    epochs = list(ClassifierTrainer(classifier, *train, recipe).run())
    assert before < 0.3
    assert accuracy(classifier, *test) > 0.8
    assert [e.number for e in epochs] == [1, 2, 3, 4]
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].accuracy > 0.8
    assert not classifier.training


def classifier_state(trainer: ClassifierTrainer) -> dict:
    return {
        "classifier": dict(trainer.classifier.state_dict()),
        "optimiser": trainer.optimiser.state_dict(),
        "generator": trainer.generator.get_state(),
        "history": list(map(tuple, trainer.history)),
    }


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_resumed_classifier_is_the_uninterrupted_one(tmp_path, stop):
    options = {"flip": True, "copies": 2}
    whole = classifier_trainer(**options)
    epochs = list(whole.run())

    first = classifier_trainer(**options)
    run = first.run()
    for _ in range(stop):
        next(run)
    first.save(tmp_path / "state.pt")

    second = classifier_trainer(seed=5, **options)
    second.load(tmp_path / "state.pt")
    assert list(second.run()) == epochs[stop:]
    assert same_state(classifier_state(second), classifier_state(whole))


def test_a_checkpoint_of_another_classifier_is_refused(tmp_path):
    classifier_trainer().save(tmp_path / "state.pt")
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = load_data("digits", "train")
    trainer = ClassifierTrainer(linear, *data, ClassifierRecipe())
    with pytest.raises(UsageError, match="no checkpoint of this classifier"):
        trainer.load(tmp_path / "state.pt")


@pytest.mark.parametrize("content", [{"x": 1}, [1, 2], torch.ones(3)])
def test_what_is_no_checkpoint_of_a_classifier_is_refused(tmp_path, content):
    save_state(tmp_path / "other.pt", content)
    with pytest.raises(UsageError, match=r"other\.pt is no checkpoint"):
        classifier_trainer().load(tmp_path / "other.pt")


def test_epochs_cycle_through_the_purified_copies():
    asked = []

    def copies(number: int) -> torch.Tensor:
        asked.append(number)
        return load_data("digits", "train").images[:200]

    list(classifier_trainer(images=copies, epochs=5, copies=2).run())
    assert asked == [0, 1, 0, 1, 0]


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    trainer = classifier_trainer(epochs=10, lr=0.4, warmup=0.25)
    rates = []
    for share in torch.linspace(0, 1, 101).tolist():
        trainer._schedule(share)
        rates.append(trainer.optimiser.param_groups[0]["lr"])
    assert rates[0] == 0
    assert math.isclose(max(rates), rates[25], rel_tol=1e-6)
    assert math.isclose(rates[25], 0.4, rel_tol=1e-6)
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert abs(rates[-1]) < 1e-9


def test_without_warmup_the_rate_starts_at_its_peak():
    trainer = classifier_trainer(lr=0.4, warmup=0.0)
    trainer._schedule(0.0)
    assert math.isclose(trainer.optimiser.param_groups[0]["lr"], 0.4)


def test_without_flip_and_padding_images_are_seen_as_they_are():
    trainer = classifier_trainer(padding=0)
    images = torch.rand(5, 1, 8, 8, generator=seeded(0))
    assert torch.equal(trainer._augment(images), images)


def test_flip_mirrors_about_half_of_the_images():
    trainer = classifier_trainer(padding=0, flip=True)
    images = torch.rand(1000, 1, 4, 4, generator=seeded(0))
    seen = trainer._augment(images)
    mirrored = (seen == images.flip(3)).flatten(1).all(1)
    kept = (seen == images).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    # Binomial(1000, 1/2): standard deviation 16.
    assert abs(int(mirrored.sum()) - 500) < 5 * 16


@quick
@given(
    padding=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_shift_moves_each_image_as_a_whole_and_fills_with_zero(
    padding, height, width, channels, seed
):
    x = 1 + torch.rand(4, channels, height, width, generator=seeded(seed))
    offsets = torch.randint(2 * padding + 1, (2, 4), generator=seeded(seed + 1))
    moved = shifted(x, padding, seeded(seed + 1))
    for i in range(4):
        down, right = (int(padding - o) for o in offsets[:, i])
        expected = torch.zeros(channels, height, width)
        for row in range(height):
            for column in range(width):
                if 0 <= row - down < height and 0 <= column - right < width:
                    expected[:, row, column] = x[i, :, row - down, column - right]
        assert torch.equal(moved[i], expected)


def test_every_shift_occurs():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    moved = shifted(x.expand(2000, 1, 5, 5), 2, seeded(0))
    counts = moved.sum(0).flatten()
    # 25 places, 80 each on average, standard deviation 8.8.
    assert float(counts.sum()) == 2000
    assert float((counts - 80).abs().max()) < 5 * 8.8


def test_accuracy_is_the_share_that_is_right():
    class Brightness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return F.one_hot((x.mean(dim=(1, 2, 3)) > 0.5).long(), 2).float()

    images = torch.cat([torch.zeros(3, 1, 2, 2), torch.ones(4, 1, 2, 2)])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 0])
    assert accuracy(Brightness(), images, labels, batch=2) == 5 / 7
    assert accuracy(Brightness(), images[:0], labels[:0]) == 0
