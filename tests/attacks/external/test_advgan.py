"""AdvGAN: what training a generator does, and what the attack then is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ebm_defense import UsageError
from ebm_defense.attacks import AdvGAN, ThreatModel
from ebm_defense.attacks.external.advgan import Generator, GeneratorSettings
from ebm_defense.attacks.external.advgan_training import AdvGANRecipe, AdvGANTrainer, CarliniWagner
from ebm_defense.defense import as_defense
from ebm_defense.eval import evaluate

THREATS = [ThreatModel(norm="Linf", eps=0.1), ThreatModel(norm="L2", eps=0.8)]
QUICK = {"batch": 16, "width": 4, "lr": 0.01, "gan_weight": 0.01}


@pytest.fixture(scope="module")
def images():
    return torch.rand((48, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def linear(two_class):
    weight = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(1))
    return two_class(weight, float(-0.5 * weight.sum()))


@pytest.fixture(scope="module")
def labels(linear, images):
    return linear(images).argmax(1)


def trained(model, images, labels, threat, updates, **more) -> AdvGANTrainer:
    recipe = AdvGANRecipe(updates=updates, **(QUICK | more))
    trainer = AdvGANTrainer(as_defense(model), images, labels, threat, recipe)
    list(trainer.run())
    return trainer


@pytest.mark.parametrize("scale", [lambda x: (x * 255).byte(), lambda x: x * 2 - 1])
def test_training_on_images_on_another_scale_is_refused(linear, images, labels, scale) -> None:
    with pytest.raises(UsageError, match="training images"):
        trained(linear, scale(images), labels, THREATS[0], 1)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_training_beats_noise_of_the_same_size_within_the_threat(linear, threat) -> None:
    images = torch.rand((160, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = linear(images).argmax(1)
    before = torch.get_rng_state()
    trainer = trained(linear, images[:64], labels[:64], threat, 60)
    attack = AdvGAN(weights=trainer.generator, threat=threat, replicates=2)
    images, labels = images[64:], labels[64:]  # none that it was trained on
    found = attack(linear, images, labels)
    assert torch.equal(torch.get_rng_state(), before)
    signs = torch.rand(images.shape, generator=torch.Generator().manual_seed(2)).sub(0.5).sign()
    noisy = threat.project(images + signs, images)
    wrong, luck = ((linear(x).argmax(1) != labels).float().mean() for x in (found, noisy))
    assert wrong >= luck + 0.3
    assert float(threat.size(found, images).max()) <= threat.eps * (1 + 1e-5)
    assert found.min() >= 0
    assert found.max() <= 1


def test_an_image_is_attacked_alike_in_any_batch(linear, images, labels) -> None:
    attack = AdvGAN(weights=Generator(GeneratorSettings(width=4)), threat=THREATS[0])
    together = attack(linear, images[:5], labels[:5])
    alone = torch.cat([attack(linear, images[i : i + 1], labels[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 5, 7), (1, 1, 1)])
def test_images_of_any_size_and_channels(shape) -> None:
    generator = Generator(GeneratorSettings(channels=shape[0], width=4))
    images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    assert generator.perturb(images, THREATS[1]).shape == images.shape


def test_the_hinge_holds_the_perturbation_down(linear, images, labels) -> None:
    free, held = (
        trained(linear, images, labels, THREATS[0], 25, hinge_weight=weight, bound=0.2)
        for weight in (0.0, 50.0)
    )
    sizes = [
        trainer.generator.unbounded(images, THREATS[0]).flatten(1).norm(dim=1).mean()
        for trainer in (free, held)
    ]
    assert sizes[1] < 0.6 * sizes[0]


def test_training_resumes_exactly(linear, images, labels, tmp_path) -> None:
    whole = trained(linear, images, labels, THREATS[0], 4)
    trained(linear, images, labels, THREATS[0], 2).save(tmp_path / "checkpoint.pt")
    recipe = AdvGANRecipe(updates=4, **QUICK)
    resumed = AdvGANTrainer(as_defense(linear), images, labels, THREATS[0], recipe)
    resumed.load(tmp_path / "checkpoint.pt")
    list(resumed.run())
    assert resumed.history == whole.history
    pairs = zip(resumed.generator.parameters(), whole.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = AdvGANTrainer(as_defense(linear), images, labels, THREATS[0], AdvGANRecipe(width=8))
    with pytest.raises(UsageError, match="no checkpoint of this generator"):
        other.load(tmp_path / "checkpoint.pt")


def test_it_trains_against_a_random_defense(langevin_defense) -> None:
    images = torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    defense, labels = langevin_defense().float(), torch.arange(6) % 3
    trainer = AdvGANTrainer(
        defense, images, labels, THREATS[0], AdvGANRecipe(updates=2, width=4, batch=4)
    )
    first, second = trainer.run()
    assert (first.number, second.number) == (1, 2)
    assert defense.calls == 0


def test_the_margin_is_the_published_one_and_stops_at_the_confidence() -> None:
    logits = torch.tensor([[[3.0, 1.0, 0.0], [0.0, 9.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 9.0, 1.0]]])
    margins = CarliniWagner(confidence=5.0)(logits, torch.tensor([0, 0]))
    assert margins.tolist() == [-1.0, 5.0]


def test_a_folder_holds_all_that_the_attack_needs(linear, images, labels, tmp_path) -> None:
    generator = Generator(GeneratorSettings(width=8, blocks=1))
    folder = generator.save(tmp_path / "gan")
    attack = AdvGAN(weights=folder, threat=THREATS[0], replicates=2)
    same = AdvGAN(weights=generator, threat=THREATS[0], replicates=2)
    assert torch.equal(attack(linear, images, labels), same(linear, images, labels))
    report = evaluate(
        linear, images[:4], labels[:4], attacks=[attack], judge_replicates=1, out=tmp_path / "run"
    )
    kept = (tmp_path / "run" / "settings.toml").read_text()
    assert report.settings["protocol"]["attacks"][0]["weights"]["weights"] in kept
    with torch.no_grad():
        generator.last.bias += 1e-3
    generator.save(folder)
    other = AdvGAN(weights=folder, threat=THREATS[0], replicates=2)
    with pytest.raises(UsageError, match=r"weights\.weights"):
        evaluate(
            linear, images[:4], labels[:4], attacks=[other], judge_replicates=1,
            out=tmp_path / "run",
        )  # fmt: skip


def test_mistakes_are_named(linear, images, labels, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"holds no advgan\.toml"):
        AdvGAN(weights=tmp_path, threat=THREATS[0])
    (tmp_path / "advgan.toml").write_text("width = = 3")
    with pytest.raises(UsageError, match="damaged"):
        AdvGAN(weights=tmp_path, threat=THREATS[0])
    colour = AdvGAN(weights=Generator(GeneratorSettings(channels=3, width=4)), threat=THREATS[0])
    with pytest.raises(UsageError, match="3 channels, not 1"):
        colour(linear, images, labels)
    with pytest.raises(UsageError, match="multiple of 4"):
        GeneratorSettings(width=6)
    with pytest.raises(UsageError, match="updates, batch"):
        AdvGANRecipe(updates=0)
    with pytest.raises(UsageError, match="0 or more"):
        AdvGANRecipe(bound=-1.0)
    with pytest.raises(UsageError, match="replicates"):
        AdvGAN(weights=Generator(GeneratorSettings(width=4)), replicates=0)
    assert isinstance(Generator(GeneratorSettings(width=4, blocks=0)).blocks, nn.Sequential)
