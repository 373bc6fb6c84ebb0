"""Attacks of foolbox, torchattacks and ART by name."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.attacks import ArtAttack, FoolboxAttack, ThreatModel, TorchattacksAttack
from ebm_defense.attacks.catalogue import LIBRARIES
from ebm_defense.attacks.external.library import forked_generators
from ebm_defense.defense import as_defense
from ebm_defense.eval import evaluate

LINF, L2 = ThreatModel(norm="Linf", eps=0.1), ThreatModel(norm="L2", eps=1.0)
L1 = ThreatModel(norm="L1", eps=1.0)
# (library, class, threat, its own parameters, the least that it must break of eight images)
WORKING = [
    (FoolboxAttack, "LinfPGD", LINF, {"steps": 4, "abs_stepsize": 0.05}, 7),
    (FoolboxAttack, "L2DeepFoolAttack", L2, {"steps": 8}, 6),
    (FoolboxAttack, "HopSkipJumpAttack", LINF, {"steps": 1, "max_gradient_eval_steps": 20}, 0),
    (FoolboxAttack, "InversionAttack", LINF, {}, 0),
    (FoolboxAttack, "DatasetAttack", L2, {}, 0),
    (TorchattacksAttack, "APGD", LINF, {"steps": 8}, 7),
    (TorchattacksAttack, "FAB", L2, {"steps": 4}, 6),
    (TorchattacksAttack, "PGDL2", L2, {"steps": 4, "alpha": 0.5}, 8),
    (TorchattacksAttack, "Square", LINF, {"n_queries": 30}, 1),
    (TorchattacksAttack, "GN", LINF, {}, 0),
    (ArtAttack, "ProjectedGradientDescent", LINF, {"max_iter": 4}, 7),
    (ArtAttack, "AutoProjectedGradientDescent", L2, {"max_iter": 4, "nb_random_init": 1}, 7),
    (ArtAttack, "SquareAttack", LINF, {"max_iter": 20}, 1),
    (ArtAttack, "DeepFool", L2, {"max_iter": 5}, 6),
    (ArtAttack, "SimBA", L2, {"max_iter": 5}, 0),
    (ArtAttack, "HopSkipJump", LINF, {"max_iter": 1, "max_eval": 10, "init_eval": 5}, 0),
]


@pytest.fixture(scope="module")
def linear():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 3)
    layer.weight.data = 0.5 * torch.randn((3, 64), generator=generator)
    layer.bias.data.zero_()
    return nn.Sequential(nn.Flatten(), layer)


@pytest.fixture(scope="module")
def images():
    return torch.rand((8, 1, 8, 8), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def labels(linear, images):
    with torch.no_grad():
        return linear(images).argmax(1)


def states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


@pytest.mark.parametrize(
    ("kind", "name", "threat", "own", "least"),
    WORKING,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_attack_finds_images_within_its_threat_and_touches_no_global_generator(
    linear, images, labels, kind, name, threat, own, least
) -> None:
    attack, before = kind.of(name, threat=threat, replicates=2, **own), states()
    found = attack(linear, images, labels)
    assert states() == before
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert float(threat.size(found, images).max()) <= threat.eps * (1 + 1e-5)
    assert int((linear(found).argmax(1) != labels).sum()) >= least
    random.seed(5)
    np.random.seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(attack(linear, images, labels), found)


class Solid(nn.Module):
    """Class 0 whatever the image, with a gradient: every attack runs to its end."""

    def forward(self, x):
        return torch.stack([9.0 + x.flatten(1).mean(1), *x.flatten(1)[:, :2].unbind(1)], dim=1)


ANNOUNCED = [
    (FoolboxAttack, "LinfPGD", LINF, {"steps": 3}),
    (FoolboxAttack, "L1PGD", L1, {"steps": 2}),
    (FoolboxAttack, "L2AdamPGD", L2, {"steps": 2}),
    (FoolboxAttack, "L2BasicIterativeAttack", L2, {}),
    (FoolboxAttack, "L2AdamBasicIterativeAttack", L2, {"steps": 4}),
    (FoolboxAttack, "FGSM", LINF, {}),
    (TorchattacksAttack, "FGSM", LINF, {}),
    (TorchattacksAttack, "BIM", LINF, {}),
    (TorchattacksAttack, "MIFGSM", LINF, {"steps": 3}),
    (TorchattacksAttack, "PGD", LINF, {"steps": 3}),
    (TorchattacksAttack, "PGDL2", L2, {"steps": 3}),
    (TorchattacksAttack, "EOTPGD", LINF, {"steps": 2, "eot_iter": 3}),
    (TorchattacksAttack, "APGD", LINF, {"steps": 3, "n_restarts": 2, "eot_iter": 2}),
    (TorchattacksAttack, "Square", L2, {"n_queries": 4, "n_restarts": 3}),
    (ArtAttack, "BasicIterativeMethod", LINF, {"max_iter": 3}),
    (ArtAttack, "ProjectedGradientDescent", L2, {"max_iter": 3}),
    (ArtAttack, "ProjectedGradientDescent", LINF, {"max_iter": 3, "num_random_init": 2}),
]
OPEN = [
    (FoolboxAttack, "L2DeepFoolAttack", L2, {"steps": 2}),
    (TorchattacksAttack, "FAB", L2, {"steps": 2}),
    (ArtAttack, "DeepFool", L2, {"max_iter": 2}),
]


def spent(attack, counting_purifier, images, listen) -> tuple[int, int]:
    """The chain-steps that an attack really costs, and those that it tells the judge."""
    defense, heard = PurifiedClassifier(Solid(), counting_purifier), listen()
    labels = torch.zeros(len(images), dtype=torch.long)
    attack.run(defense, images, labels, ids=range(len(images)), seed=0, judge=heard)
    (proposal,) = heard.proposals
    return sum(counting_purifier.rows) * counting_purifier.chain_steps, proposal.chain_steps


@pytest.mark.parametrize(
    ("kind", "name", "threat", "own"), ANNOUNCED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_cost_of_a_well_known_class_is_announced(
    images, counting_purifier, listen, kind, name, threat, own
) -> None:
    attack = kind.of(name, threat=threat, replicates=2, **own)
    real, told = spent(attack, counting_purifier, images[:3], listen)
    defense = PurifiedClassifier(Solid(), counting_purifier)
    assert not attack.open_ended
    assert real == told == 3 * attack.chain_steps(defense)


@pytest.mark.parametrize(
    ("kind", "name", "threat", "own"), OPEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_the_cost_of_other_classes_is_counted_as_it_arises(
    images, counting_purifier, listen, kind, name, threat, own
) -> None:
    attack = kind.of(name, threat=threat, replicates=2, **own)
    real, told = spent(attack, counting_purifier, images[:3], listen)
    least = attack.chain_steps(PurifiedClassifier(Solid(), counting_purifier))
    assert attack.open_ended
    assert real == told > 3 * least == 3 * 2 * counting_purifier.chain_steps


def test_every_class_whose_cost_is_announced_exists() -> None:
    for kind in LIBRARIES:
        assert set(kind.calls) <= {c.__name__ for c in kind.classes().values()}


def test_a_parameter_that_is_no_number_is_left_to_the_library() -> None:
    assert FoolboxAttack.of("LinfPGD", threat=LINF, steps=None).open_ended


def test_one_image_after_the_other_costs_what_every_try_costs(counting_purifier, images) -> None:
    images = images.clone().clamp(max=0.9)
    images[2, 0, 0, 0] = 1.0
    defense = PurifiedClassifier(Fussy(), counting_purifier)
    attack = TorchattacksAttack.of("FGSM", threat=LINF, replicates=2)
    with pytest.warns(UserWarning, match="gave up on image 2"):
        crafted = attack.craft(
            defense, images, torch.zeros(8, dtype=torch.long), ids=range(8), seed=0
        )
    assert crafted.chain_steps == sum(counting_purifier.rows) * counting_purifier.chain_steps


def refusal(kind, name: str) -> str:
    """Why a class cannot be used in Linf; nothing if it can."""
    try:
        kind(attack=name, threat=LINF)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", LIBRARIES)
def test_every_class_is_made_or_refused_in_one_sentence(kind) -> None:
    said = [refusal(kind, name) for name in kind.classes()]
    assert len(said) > 30
    assert said.count("") > 12
    assert all(text.endswith(".") and "\n" not in text for text in said if text)


def test_the_global_generators_come_back_after_a_failure() -> None:
    def fail() -> None:
        with forked_generators(3, torch.device("cpu")):
            raise KeyError(torch.rand(1), np.random.rand(1), random.random())

    before = states()
    with pytest.raises(KeyError):
        fail()
    assert states() == before


@pytest.mark.parametrize(
    "attack",
    [
        FoolboxAttack.of("LinfPGD", threat=LINF, replicates=2, steps=2),
        TorchattacksAttack.of("EOTPGD", threat=LINF, replicates=2, steps=2),
        ArtAttack.of("ProjectedGradientDescent", threat=LINF, replicates=2, max_iter=2),
    ],
    ids=lambda attack: attack.library,
)
def test_a_random_defense_is_attacked_alike_whatever_ran_before(shipped, sample, attack) -> None:
    images = sample.images[:2]
    with torch.no_grad():
        labels = shipped(images).argmax(1)
    calls = shipped.calls
    first = attack.run(shipped, images, labels, ids=[4, 5], seed=1)
    assert shipped.calls == calls
    shipped(images)
    assert torch.equal(attack.run(shipped, images, labels, ids=[4, 5], seed=1), first)
    other = attack.run(shipped, images, labels, ids=[4, 5], seed=2)
    assert not torch.equal(other, first)
    assert not torch.equal(attack.run(shipped, images, labels, ids=[7, 8], seed=1), first)


def test_the_judge_hears_one_projected_proposal(langevin_defense, listen) -> None:
    defense, heard = langevin_defense(), listen()
    images = torch.rand((2, 1, 8, 8), dtype=torch.float64, generator=torch.Generator())
    attack = TorchattacksAttack.of("GN", threat=ThreatModel(eps=0.01), replicates=4, std=3.0)
    found = attack.run(defense, images, torch.arange(2), ids=[0, 1], seed=0, judge=heard)
    (proposal,) = heard.proposals
    assert torch.equal(proposal.images, found)
    assert proposal.logits.shape == (4, 2, 3)
    torch.testing.assert_close(attack.threat.size(found, images), torch.full((2,), 0.01).double())
    assert attack.chain_steps(defense) == 4 * 3
    nothing = attack.run(defense, images[:0], torch.arange(0), ids=[], seed=0, judge=heard)
    assert len(nothing) == 0
    assert len(heard.proposals) == 1


def test_evaluate_judges_a_library_attack_and_keeps_its_parameters(
    linear, images, labels, tmp_path
) -> None:
    defense = PurifiedClassifier(linear, nn.Identity(), replicates=2)
    attack = FoolboxAttack.of("LinfPGD", threat=LINF, replicates=2, steps=3, abs_stepsize=0.05)
    report = evaluate(
        defense, images, labels, attacks=[attack], judge_replicates=2, out=tmp_path / "run"
    )
    assert report.robust().value <= 1 / 8
    settings = (tmp_path / "run" / "settings.toml").read_text()
    assert 'kind = "FoolboxAttack"' in settings
    assert 'parameters = "abs_stepsize=0.05, steps=3"' in settings


class Fussy(nn.Module):
    """Refuses to be asked for gradients of images whose first pixel is above 0.95."""

    def forward(self, x):
        if x.requires_grad and bool((x[:, 0, 0, 0] > 0.95).any()):
            raise RuntimeError("that image is too much\nfor me")
        return torch.stack([x.flatten(1).sum(1), 0 * x.flatten(1).sum(1) + 32], dim=1)


def test_an_image_that_a_library_fails_on_stays_with_a_warning(images) -> None:
    images = images.clone().clamp(max=0.9)
    images[2, 0, 0, 0] = 1.0
    labels = Fussy()(images).argmax(1)
    attack = TorchattacksAttack.of("FGSM", threat=LINF)
    with pytest.warns(UserWarning, match="gave up on image 2 .*too much"):
        found = attack(Fussy(), images, labels)
    assert torch.equal(found[2], images[2])
    assert bool((found != images).flatten(1).any(1)[[0, 1, 3]].all())
    with pytest.raises(UsageError, match="cannot attack this model") as caught:
        attack(Fussy(), images[2:3], labels[2:3])
    assert "\n" not in str(caught.value)


def test_classes_are_counted_for_the_library(two_class, images) -> None:
    weight = torch.randn((1, 8, 8), generator=torch.Generator().manual_seed(2))
    network = two_class(weight, 0.0)
    labels = network(images).argmax(1)
    attack = TorchattacksAttack.of("FAB", threat=LINF, steps=3, multi_targeted=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = attack.run(as_defense(network), images, labels, ids=range(8), seed=0)
    assert int((network(found).argmax(1) != labels).sum()) >= 4


@pytest.mark.parametrize(
    ("kind", "name", "threat", "own", "said"),
    [
        (FoolboxAttack, "L2DeepFol", L2, {}, "near it are L2DeepFoolAttack"),
        (FoolboxAttack, "L2PGD", LINF, {}, "moves in L2, not in Linf"),
        (FoolboxAttack, "L0FMNAttack", L2, {}, "moves in L0, not in L2"),
        (FoolboxAttack, "HopSkipJumpAttack", L1, {}, "moves in Linf or L2, not in L1"),
        (TorchattacksAttack, "FAB", L1, {}, "moves in Linf or L2, not in L1"),
        (ArtAttack, "SquareAttack", L1, {}, "moves in Linf or L2, not in L1"),
        (FoolboxAttack, "SpatialAttack", LINF, {}, "no norm bounds"),
        (FoolboxAttack, "GenAttack", LINF, {}, "target class"),
        (FoolboxAttack, "VirtualAdversarialAttack", L2, {}, "needs its steps"),
        (FoolboxAttack, "LinfPGD", LINF, {"stepz": 3}, "takes no 'stepz'; it takes abs_stepsize"),
        (FoolboxAttack, "LinfPGD", LINF, {"steps": nn.Identity()}, "a plain value"),
        (TorchattacksAttack, "LGV", LINF, {}, "trains copies"),
        (TorchattacksAttack, "CW", LINF, {}, "moves in L2"),
        (TorchattacksAttack, "PGD", LINF, {"model": 3}, "takes no 'model'"),
        (ArtAttack, "AdversarialPatch", LINF, {}, "patch"),
        (ArtAttack, "DecisionTreeAttack", LINF, {}, "cannot be used here"),
        (ArtAttack, "nothing like it", LINF, {}, "art has no attack"),
    ],
)
def test_what_cannot_work_is_refused_at_once(kind, name, threat, own, said) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        kind.of(name, threat=threat, **own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        (FoolboxAttack, "foolbox", "foolbox"),
        (TorchattacksAttack, "torchattacks", "torchattacks"),
        (ArtAttack, "art.attacks.evasion", "adversarial-robustness-toolbox"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    monkeypatch, kind, module, package
) -> None:
    kind.classes.__func__.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(UsageError, match=rf"ebm-defense\[attacks\].*{package}"):
        kind(attack="PGD", threat=LINF)
