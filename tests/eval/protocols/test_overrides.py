"""A protocol's numbers with other attacks, gradients or losses."""

from __future__ import annotations

import pytest

from ebm_defense import UsageError
from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.attacks.catalogue import FACTORS
from ebm_defense.attacks.gradients.registry import GRADIENTS
from ebm_defense.attacks.gradients.smoothed import Smoothed
from ebm_defense.attacks.losses import LOSSES, CrossEntropy
from ebm_defense.eval import get_protocol
from ebm_defense.eval.protocols.overrides import override

HILL = get_protocol("hill2021", eps=0.1, steps=7, replicates=3)


def test_nothing_asked_leaves_the_protocol_as_it_is() -> None:
    assert override(HILL, (), steps=7, gradient=None) is HILL


def test_attacks_by_name_spend_the_protocols_numbers() -> None:
    chosen = override(HILL, ["foolbox:LinfPGD(steps=2)", "transfer", "bpda"])
    library, transfer, bpda = chosen.attacks
    assert bpda == HILL.attacks[-1]
    assert transfer == HILL.attacks[0]
    assert (library.threat, library.replicates) == (bpda.threat, 3)
    assert chosen.name == "hill2021-custom"
    assert chosen.judge_replicates == HILL.judge_replicates


def test_a_gradient_and_a_loss_apply_where_they_are_taken(monkeypatch) -> None:
    monkeypatch.setitem(GRADIENTS, "mine", lambda: Smoothed(width=7.0))
    monkeypatch.setitem(LOSSES, "soft", lambda: CrossEntropy(average="softmax"))
    assert FACTORS["gradient"] is GRADIENTS
    own = override(HILL, (), gradient="mine", loss="soft")
    transfer, pgd = own.attacks
    assert (pgd.gradient.width, pgd.loss.average) == (7.0, "softmax")
    assert transfer == HILL.attacks[0]
    assert own.name == "hill2021-custom"
    named = override(HILL, ["pgd", "transfer"], gradient="mine", loss="soft")
    assert named.attacks[0] == pgd
    assert named.attacks[1].attack.loss.average == "softmax"


@pytest.mark.parametrize(
    ("names", "asked", "said"),
    [
        (["bpda"], {"gradient": "bpda"}, "no attack here takes a gradient"),
        (["foolbox:LinfPGD"], {"steps": 4}, r"no attack here takes a steps .*NAME\(steps=10\)"),
        (["foolbox:LinfPGD"], {"loss": "ce"}, "no attack here takes a loss"),
        ([], {"gradient": "hope"}, "unknown gradient 'hope'"),
        (["pgd"], {"gradient": "hope"}, "unknown gradient 'hope'"),
    ],
)
def test_what_no_attack_takes_is_refused(names, asked, said) -> None:
    with pytest.raises(UsageError, match=said):
        override(HILL, names, **asked)


def test_an_independent_source_is_told_apart_in_the_settings(langevin_defense) -> None:
    from ebm_defense.storage.serialize import describe

    pgd = PGD(threat=ThreatModel(eps=0.1), steps=1)
    one, same, longer = (langevin_defense(steps=k, seed=s) for k, s in ((3, 0), (3, 1), (4, 0)))
    told = [describe(Transfer(attack=pgd, source=d)) for d in (one, same, longer)]
    assert told[0] == told[1]
    assert told[0] != told[2]
    other = langevin_defense()
    other.classifier[1].weight.data.mul_(1.01)
    assert describe(Transfer(attack=pgd, source=other)) != told[0]
