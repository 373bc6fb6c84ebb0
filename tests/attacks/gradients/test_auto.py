"""A gradient says of itself what it is; the one that fits is chosen once, from the purifier."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.attacks import (
    APGD,
    PGD,
    Auto,
    DiffHammer,
    Full,
    Identity,
    ScoreFree,
    Smoothed,
    Surrogate,
    Transfer,
    make_gradient,
)
from ebm_defense.attacks.gradients.registry import GRADIENTS, choose_auto, fitting_gradient
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.eval import evaluate, get_protocol
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.registry import baseline


def defense(activation: str = "leaky_relu", purifier=None) -> PurifiedClassifier:
    torch.manual_seed(0)
    energy = ConvEnergy(
        ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
    )
    chain = LangevinPurifier(energy, 2, 0.05, 0.01, "fp32")
    return PurifiedClassifier(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)),
        purifier or chain,
        2,
        seed=0,
    )


def images() -> torch.Tensor:
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        (defense(), Smoothed()),
        (defense("soft_lrelu"), Full()),
        (defense(purifier=baseline("gaussian:0.1")), Full()),
        (defense(purifier=baseline("jpeg:75")), Identity()),
        (defense(purifier=lambda x: x), Identity()),
    ],
)
def test_the_gradient_that_fits_is_the_purifiers_first(model, fits):
    assert fitting_gradient(model, images()) == fits
    attack = PGD(steps=1, replicates=2, gradient=Auto())
    chosen = choose_auto(attack, model, images())
    assert chosen.gradient == fits
    # Called by itself it is the same attack.
    assert torch.equal(attack(model, images(), LABELS), chosen(model, images(), LABELS))


def test_it_is_chosen_wherever_it_stands_and_nothing_else_is_touched():
    auto = PGD(steps=1, gradient=Auto())
    attacks = (Transfer(attack=auto), APGD(steps=1, gradient=Surrogate(steps=1, through=Auto())))
    transfer, apgd = choose_auto(attacks, defense(), images())
    assert transfer.attack.gradient == apgd.gradient.through == Smoothed()
    plain = (PGD(steps=1), DiffHammer(steps=1))
    assert choose_auto(plain, defense(), images()) is plain


def test_an_evaluation_records_the_gradient_that_it_chose(tmp_path):
    attack = PGD(steps=1, replicates=2, gradient=make_gradient("auto"))
    report = evaluate(defense(), images(), LABELS, attacks=[attack], judge_replicates=4)
    assert report.protocol.attacks[0].gradient == Smoothed()
    assert report.settings["protocol"]["attacks"][0]["gradient"]["kind"] == "Smoothed"


def test_standard_keeps_its_name_only_where_a_gradient_goes_through_the_chain():
    standard = get_protocol("standard", steps=1, replicates=2)
    assert choose_auto(standard, defense(), images()).name == "standard"
    around = choose_auto(standard, defense(purifier=baseline("jpeg:75")), images())
    assert around.name == "standard-partial"


@pytest.mark.parametrize(
    ("gradient", "through", "own"),
    [
        (Identity(), False, False),
        (ScoreFree(), False, False),
        (Full(), True, True),
        (Smoothed(), True, False),
        (Surrogate(through=Full()), True, True),
        (Surrogate(through=Smoothed()), True, False),
        (Surrogate(through=Identity()), False, False),
    ],
)
def test_a_gradient_says_whether_it_goes_through_the_chain(gradient, through, own):
    assert (gradient.through_chain, gradient.own_curvature) == (through, own)


@pytest.mark.parametrize("name", GRADIENTS)
def test_names_are_not_to_be_chosen(name):
    with pytest.raises(UsageError, match="takes no 'name'"):
        make_gradient(f"{name}(name='full')")
