"""Every attack by name."""

from __future__ import annotations

import pytest

from ebm_defense import UsageError
from ebm_defense.attacks import (
    ATTACKS,
    PGD,
    ScoreFree,
    Surrogate,
    ThreatModel,
    Transfer,
    make_attack,
    spec,
)
from ebm_defense.attacks.catalogue import FAMILIES, Entry, library_attacks, takes
from ebm_defense.attacks.losses import CrossEntropy
from ebm_defense.attacks.norms import NORMS

LINF = ThreatModel(norm="Linf", eps=0.1)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_is_made_in_every_norm_it_names(name) -> None:
    entry = ATTACKS[name]
    assert entry.summary
    assert entry.source
    for norm in entry.norms:
        attack = make_attack(name, threat=ThreatModel(norm=norm, eps=0.1))
        assert str(attack.threat) == f"{norm} 0.1"
        assert attack.name
        assert attack.replicates >= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_runs_on_a_random_defense(name, langevin_defense) -> None:
    import torch

    small = {"steps": 2, "replicates": 2}
    taken = {k: v for k, v in small.items() if k in takes(name)}
    attack = make_attack(name, threat=LINF, **taken)
    images = torch.rand((2, 1, 8, 8), dtype=torch.float64, generator=torch.Generator())
    found = attack(langevin_defense(classes=5), images, torch.arange(2))
    assert float(attack.threat.size(found, images).max()) <= 0.1 * (1 + 1e-9)
    assert attack.chain_steps(langevin_defense()) > 0


def test_steps_are_a_quarter_of_eps_unless_given() -> None:
    made = make_attack("bpda", threat=LINF, steps=7, replicates=3)
    assert made == PGD(threat=LINF, steps=7, step_size=0.025, replicates=3)
    assert make_attack("bpda(step_size=0.5)", threat=LINF).step_size == 0.5


def test_brackets_win_over_settings() -> None:
    made = make_attack("pgd(steps=3, random_start=False)", threat=LINF, steps=9)
    assert (made.steps, made.random_start) == (3, False)


def test_parts_are_made_from_their_names() -> None:
    made = make_attack("pgd", threat=LINF, loss="ce(average='softmax')", gradient="bpda")
    assert made.loss == CrossEntropy(average="softmax")
    assert make_attack("pgd(loss='ce')", threat=LINF).loss == CrossEntropy()


def test_a_new_attack_is_one_line(monkeypatch) -> None:
    monkeypatch.setitem(ATTACKS, "mine", Entry(PGD, "my attack", "nobody 2031", ("L2",)))
    assert make_attack("mine", threat=ThreatModel(norm="L2", eps=1.0)).threat.norm == "L2"
    with pytest.raises(UsageError, match="attack mine keeps to L2, not Linf"):
        make_attack("mine", threat=LINF)


def test_members_are_attacks_of_a_norm_there_is() -> None:
    found = dict(library_attacks())
    assert {"foolbox:L2DeepFoolAttack", "torchattacks:APGDT", "art:SquareAttack"} <= set(found)
    assert found["foolbox:L2DeepFoolAttack"] == "L2"
    assert found["torchattacks:APGDT"] == "Linf L2"
    assert found["art:AutoProjectedGradientDescent"] == " ".join(NORMS)
    assert "foolbox:L0FMNAttack" not in found
    assert "art:AdversarialPatch" not in found


def test_a_library_attack_takes_its_own_parameters_by_keyword_or_in_brackets() -> None:
    one = make_attack("foolbox:LinfPGD", threat=LINF, replicates=3, steps=4)
    other = make_attack("foolbox:LinfPGD(steps=4)", threat=LINF, replicates=3)
    assert one == other
    assert one.parameters == "steps=4"
    assert takes("foolbox:LinfPGD") == {"threat", "replicates"}


def test_transfer_is_named_by_its_source(tiny_defense) -> None:
    own = make_attack("transfer:undefended", threat=LINF, steps=2)
    assert own == Transfer(
        attack=PGD(threat=LINF, steps=2, step_size=0.025), replicates=15, source="undefended"
    )
    other = make_attack(f"transfer:{tiny_defense}", threat=LINF)
    assert other.label == str(tiny_defense)
    assert other.source.purifier.chain_steps == 3


@pytest.mark.parametrize(
    ("text", "settings", "said"),
    [
        ("magic", {}, "unknown attack 'magic'; choose one of"),
        ("magic:PGD", {}, "unknown family of attacks 'magic'"),
        ("foolbox:", {}, "write foolbox:NAME"),
        ("bpda(gradient='bpda')", {}, "attack bpda takes no 'gradient'"),
        ("transfer", {"gradient": "bpda"}, "attack transfer takes no 'gradient'"),
        ("pgd", {"loss": "hope"}, "unknown loss 'hope'; choose one of"),
        ("pgd", {"loss": "ce(mean=1)"}, "loss ce takes no 'mean'; it takes average"),
        ("pgd(steps=-1)", {}, "steps ≥ 0"),
        ("pgd(steps=__import__('os'))", {}, "plain values"),
        ("pgd(3)", {}, "name\\(parameter=value"),
        ("pgd(**{'steps': 3})", {}, "name\\(parameter=value"),
        ("pgd(steps=3).name", {}, "does not close"),
        ("pgd(steps=3).f()", {}, "name\\(parameter=value"),
        ("pgd(gradient=full(3))", {}, "name\\(parameter=value"),
        ("pgd(gradient=full().f())", {}, "name\\(parameter=value"),
        ("pgd(gradient=full(depth=3))", {}, "gradient full takes no 'depth'"),
        ("square(rescale=false)", {}, "plain values"),
        ("pgd(steps=3), f(x=2)", {}, "name\\(parameter=value"),
        ("pgd(steps=3", {}, "does not close"),
        ("advgan:/nowhere", {}, "holds no advgan.toml"),
        ("transfer:nowhere", {}, "no defense 'nowhere'"),
    ],
)
def test_mistakes_are_one_sentence(text, settings, said) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        make_attack(text, threat=LINF, **settings)
    assert "\n" not in str(caught.value)


def test_every_family_has_a_line() -> None:
    assert all(entry.summary and entry.source for entry in FAMILIES.values())


def test_specs_are_written_as_they_are_read() -> None:
    values = {"steps": 3, "loss": "it's", "sizes": [1, 2.5, None], "flag": True}
    assert spec.parameters(spec.write(values, "x"), "x") == values


def test_parts_stand_within_parts_without_quotes() -> None:
    through = "surrogate(steps=5, through=score-free(samples=3))"
    attack = make_attack(f"pgd(gradient={through}, loss=dlr(average='logits'))", threat=LINF)
    quoted = make_attack(
        """pgd(gradient="surrogate(steps=5, through='score-free(samples=3)')", loss='dlr')""",
        threat=LINF,
    )
    assert attack == quoted
    assert isinstance(attack, PGD)
    assert attack.gradient == Surrogate(steps=5, through=ScoreFree(samples=3))
