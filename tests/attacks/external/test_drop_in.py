"""Public attack libraries run on a purified classifier as it is, and the judge takes their images.

Every attack runs for a few steps on a few images: what is tested is that it runs, not how strong
it is. `benchmarks/drop_in.py` runs them in full.
"""

import pytest
import torch

from ebm_defense import load_defense
from ebm_defense._torchvision import torchvision
from ebm_defense.attacks import ThreatModel
from ebm_defense.eval import judge_images

LINF, L2 = ThreatModel(norm="Linf", eps=8 / 255), ThreatModel(norm="L2", eps=0.5)
COUNT = 3


@pytest.fixture(scope="module")
def foolbox():
    # Both libraries import torchvision, which does not load everywhere by itself.
    torchvision("datasets")
    return pytest.importorskip("foolbox")


@pytest.fixture(scope="module")
def torchattacks():
    torchvision("datasets")
    return pytest.importorskip("torchattacks")


@pytest.fixture
def images(sample):
    return sample.images[:COUNT].clone()


@pytest.fixture
def labels(shipped, images):
    """What the defense says, since attacks pass over images that are wrong as they are."""
    with torch.no_grad():
        return shipped(images).argmax(1)


def check(defense, images, adversarial, labels, threat) -> None:
    """The attack asked the defense, obeyed the threat model, and its images can be judged."""
    adversarial = adversarial.detach()
    assert defense.calls > 2
    assert adversarial.shape == images.shape
    assert float(threat.size(adversarial, images).max()) <= threat.eps + 1e-5
    verdict = judge_images(defense, images, adversarial, labels, threat=threat, replicates=4)
    assert verdict.stands.shape == labels.shape
    torch.testing.assert_close(verdict.images, adversarial, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("name", "threat"), [("LinfPGD", LINF), ("L2PGD", L2)], ids=["Linf", "L2"])
@pytest.mark.parametrize("eot", [False, True], ids=["plain", "eot"])
def test_foolbox_pgd_attacks_the_defense(foolbox, shipped, images, labels, name, threat, eot):
    model = foolbox.PyTorchModel(shipped, bounds=(0, 1))
    if eot:
        model = foolbox.models.ExpectationOverTransformationWrapper(model, n_steps=2)
    attack = getattr(foolbox.attacks, name)(steps=2)
    _, adversarial, _ = attack(model, images, labels, epsilons=threat.eps)
    assert not torch.equal(adversarial, images)
    check(shipped, images, adversarial, labels, threat)


TORCHATTACKS = {
    "PGD": {"alpha": 4 / 255, "steps": 2},
    "EOTPGD": {"alpha": 4 / 255, "steps": 2, "eot_iter": 2},
    "Square": {"n_queries": 4},
    "AutoAttack": {"version": "rand", "n_classes": 10, "seed": 0},
}


def make(torchattacks, name, defense):
    attack = getattr(torchattacks, name)(defense, eps=LINF.eps, **TORCHATTACKS[name])
    if name == "AutoAttack":
        for part in attack._autoattack.attacks:  # 2 × 10 steps of 20 draws take minutes
            part.steps, part.eot_iter = 2, 2
    return attack


@pytest.mark.parametrize("name", TORCHATTACKS)
def test_torchattacks_attacks_the_defense(torchattacks, shipped, images, labels, name):
    adversarial = make(torchattacks, name, shipped)(images, labels)
    check(shipped, images, adversarial, labels, LINF)


def test_the_defense_has_a_gradient_that_libraries_can_use(shipped, images, labels):
    images.requires_grad_()
    loss = torch.nn.functional.cross_entropy(shipped(images), labels)
    (gradient,) = torch.autograd.grad(loss, images)
    assert gradient.isfinite().all()
    assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


def test_reseeding_the_global_generator_does_not_repeat_the_defenses_draws(shipped, images):
    torch.manual_seed(0)
    first = shipped(images)
    torch.manual_seed(0)
    assert not torch.equal(shipped(images), first)


def test_autoattack_cannot_choose_the_defenses_draws(torchattacks, shipped, images, labels):
    make(torchattacks, "AutoAttack", shipped)(images, labels)
    untouched = load_defense("fashion-mnist-longrun", steps=5, replicates=2, seed=0)
    untouched.calls = shipped.calls
    torch.manual_seed(1)
    assert torch.equal(shipped(images), untouched(images))


def test_the_defense_leaves_the_global_generator_to_the_attack(shipped, images):
    before = torch.get_rng_state()
    shipped(images)
    assert torch.equal(torch.get_rng_state(), before)
