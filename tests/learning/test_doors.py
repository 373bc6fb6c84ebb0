"""Trainers take images and labels as people bring them, or refuse them before any work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ebm_defense import ConvEnergy, ConvEnergySettings, UsageError
from ebm_defense.attacks import ThreatModel
from ebm_defense.attacks.external.advgan_training import AdvGANRecipe, AdvGANTrainer
from ebm_defense.data import Images
from ebm_defense.langevin import LangevinSettings
from ebm_defense.learning.batches import Batches
from ebm_defense.learning.classifier import ClassifierRecipe, ClassifierTrainer
from ebm_defense.learning.energies.recipe import EnergyRecipe
from ebm_defense.learning.energies.trainer import EnergyTrainer

IMAGES = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3
CHAIN = LangevinSettings(steps=1, step_size=0.06, temperature=0.0036)


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def learned_energy(images, labels):
    energy = made(lambda: ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=4)))
    recipe = EnergyRecipe(updates=1, batch=2, bank=4, langevin=CHAIN)
    list(EnergyTrainer(energy, images, recipe, "fp32").run())
    return energy


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def learned_classifier(images, labels):
    classifier = made(network)
    list(ClassifierTrainer(classifier, images, labels, ClassifierRecipe(epochs=1, batch=3)).run())
    return classifier


def learned_attack(images, labels):
    recipe = AdvGANRecipe(updates=1, batch=2, width=4)
    trainer = AdvGANTrainer(made(network), images, labels, ThreatModel(eps=0.1), recipe)
    list(trainer.run())
    return trainer.generator


TRAINERS = {"energy": learned_energy, "classifier": learned_classifier, "AdvGAN": learned_attack}
WEIGHTS = {name: train(IMAGES, LABELS).state_dict() for name, train in TRAINERS.items()}


@pytest.fixture(params=TRAINERS)
def learn(request):
    """A trainer, as a function that asserts that it learns what it learns of plain tensors."""

    def check(images=IMAGES, labels=LABELS):
        found = TRAINERS[request.param](images, labels).state_dict()
        for name, value in WEIGHTS[request.param].items():
            torch.testing.assert_close(found[name], value)

    return check


IMAGES_AS = {
    "numpy": IMAGES.numpy,
    "list": lambda: list(IMAGES),
    "float64": IMAGES.double,
    "with a gradient": lambda: IMAGES.clone().requires_grad_(),
}


@pytest.mark.parametrize("brought", IMAGES_AS)
def test_images_of_any_kind(learn, brought):
    learn(IMAGES_AS[brought]())


@pytest.mark.parametrize(
    "labels", [LABELS.tolist(), LABELS.numpy(), LABELS.to(torch.int8), F.one_hot(LABELS)]
)
def test_labels_of_any_kind(learn, labels):
    learn(labels=labels)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: DataLoader(d, batch_size=4)])
def test_data_sets(learn, wrap):
    learn(wrap(TensorDataset(IMAGES, LABELS)), None)


WRONG = {
    "off the scale": 255 * IMAGES,
    "bytes": (255 * IMAGES).byte(),
    "from -1": 2 * IMAGES - 1,
    "not a number": IMAGES / 0 * 0,
    "no batch": IMAGES[0],
    "none": IMAGES[:0],
    "other channels": IMAGES.expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_learned_from_is_refused_in_a_sentence(name, what):
    images = WRONG[what]
    with pytest.raises(UsageError) as refused:
        TRAINERS[name](images, LABELS[: len(images)])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["classifier", "AdvGAN"])
@pytest.mark.parametrize("labels", [LABELS + 1, LABELS - 1, LABELS[:2], LABELS / 2])
def test_labels_that_do_not_fit_are_refused_in_a_sentence(name, labels):
    with pytest.raises(UsageError, match="labels"):
        TRAINERS[name](IMAGES, labels)


@pytest.mark.parametrize("what", WRONG)
def test_batches_hold_nothing_off_the_scale(what):
    images = WRONG[what]
    if what == "other channels":
        return
    with pytest.raises(UsageError):
        Batches(data=Images(images, LABELS[: len(images)]), size=1)
