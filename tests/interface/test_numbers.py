"""Numbers of settings, as people bring them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ebm_defense
from ebm_defense import LangevinPurifier, PurifiedClassifier, UsageError
from ebm_defense.attacks import APGD, PGD, ScoreFree, Smoothed, Square, ThreatModel
from ebm_defense.attacks.optimisers.ascent import Ascent
from ebm_defense.eval import get_protocol
from ebm_defense.interface.numbers import plain_numbers, real, whole
from ebm_defense.langevin import LangevinSettings
from ebm_defense.purifiers.baselines import Jpeg
from ebm_defense.purifiers.registry import PURIFIERS

WHOLE = [8, 8.0, "8", np.int16(8), np.float32(8), torch.tensor(8), torch.tensor([8.0]), np.array(8)]
REAL = [
    0.5,
    "0.5",
    "1/2",
    np.float16(0.5),
    torch.tensor(0.5, dtype=torch.bfloat16),
    np.array([0.5]),
]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number_of_any_kind_is_an_int(value):
    assert whole(value, "n") == 8
    assert type(whole(value, "n")) is int
    assert PGD(steps=value).steps == APGD(steps=value).steps == Square(steps=value).steps == 8
    assert type(PGD(replicates=value).replicates) is int
    assert LangevinSettings(steps=value).steps == ScoreFree(samples=value).samples == 8
    assert PurifiedClassifier(torch.nn.Flatten(), lambda x: x, value).replicates == 8
    assert get_protocol("quick", steps=value).attacks[0].steps == 8


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_a_number_of_any_kind_is_a_float(value):
    assert real(value, "x") == 0.5
    assert ThreatModel(eps=value).eps == PGD(step_size=value).step_size == 0.5
    assert type(ThreatModel(eps=value).eps) is float
    assert Smoothed(width=value).width == 0.5
    assert LangevinPurifier(lambda x: x, 1, step_size=value).settings.step_size == 0.5
    assert get_protocol("quick", eps=value).attacks[0].threat.eps == 0.5


@given(st.integers(-(2**63), 2**63))
def test_no_digit_of_a_long_number_is_lost(value):
    assert whole(value, "n") == whole(str(value), "n") == value


def test_a_fraction_is_exact():
    assert ThreatModel(eps="8/255").eps == 8 / 255


@pytest.mark.parametrize(
    "value", ["eight", 2.5, "2.5", True, None, [8], "8/0", np.nan, torch.ones(2)]
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(UsageError, match=r"PGD's steps must be a whole number"):
        PGD(steps=value)


@pytest.mark.parametrize("value", ["eight", True, None, [0.5], "1/0", 1j, torch.ones(2)])
def test_what_is_no_number_is_refused_by_name(value):
    with pytest.raises(UsageError, match=r"PGD's step_size must be a number"):
        PGD(step_size=value)


def test_what_may_be_left_out_may_be_left_out():
    @dataclass(frozen=True)
    class Settings:
        some: int | None = None
        other: str = "8"

        def __post_init__(self):
            plain_numbers(self)

    assert (Settings().some, Settings("8").some, Settings().other) == (None, 8, "8")


@pytest.mark.parametrize("norm", ["linf", "LINF", "Linf", "l2", "L1", "l1"])
def test_a_norm_in_any_case(norm):
    known = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm.lower()]
    assert ThreatModel(norm=norm, eps=0.1).norm == known
    assert get_protocol("quick", norm=norm).attacks[0].threat.norm == known


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 8 / 255), ("L2", 0.5), ("L1", 12.0)])
@pytest.mark.parametrize("name", ["quick", "hill2021", "mefa2026", "standard"])
def test_a_preset_has_an_eps_for_each_norm(name, norm, eps):
    for attack in get_protocol(name, norm=norm).attacks:
        assert attack.threat == ThreatModel(norm=norm, eps=eps)
        assert getattr(attack, "step_size", eps / 4) == eps / 4


def settings_of_the_package():
    """Return every frozen dataclass that checks its numbers and whose fields have defaults."""
    rooms = ("attacks", "classifiers", "data", "denoisers", "energies", "eval", "generators",
             "interface", "langevin", "learning", "networks")  # fmt: skip
    found = {}
    for info in pkgutil.walk_packages(ebm_defense.__path__, "ebm_defense."):
        if info.name.split(".")[1] in rooms:
            for kind in vars(importlib.import_module(info.name)).values():
                if inspect.isclass(kind) and is_settings(kind):
                    found[f"{kind.__module__}.{kind.__name__}"] = kind
    return found


def is_settings(kind):
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not params.frozen or not hasattr(kind, "__post_init__"):
        return False
    if kind is Ascent:  # has no name of its own
        return False
    missing = dataclasses.MISSING
    return all(f.default is not missing or f.default_factory is not missing
               for f in dataclasses.fields(kind))  # fmt: skip


DECLARED = ("int", "float", "int | None", "float | None")
SETTINGS = settings_of_the_package()


@pytest.mark.parametrize("name", SETTINGS)
def test_all_settings_take_numbers_as_people_bring_them(name):
    kind = SETTINGS[name]
    for field in dataclasses.fields(kind):
        if field.default is None or field.type not in DECLARED:
            continue
        for bring in (np.float64, torch.tensor, lambda v: np.array([v]), str):
            found = getattr(kind(**{field.name: bring(field.default)}), field.name)
            assert type(found) is (float if field.type.startswith("float") else int)
            assert found == pytest.approx(field.default)


def test_there_are_settings():
    assert len(SETTINGS) > 20


@pytest.mark.parametrize("spec", ["gaussian", "bits", "jpeg", "tv", "median"])
@pytest.mark.parametrize("bring", [np.int64, float, str, torch.tensor])
def test_baselines_take_numbers_as_people_bring_them(spec, bring):
    number = PURIFIERS[spec](bring(3)).numbers
    assert all(type(value) in (int, float) for value in number.values())
    assert list(number.values()) == [3]


def test_a_quality_between_two_is_refused():
    with pytest.raises(UsageError, match="whole number"):
        Jpeg(75.5)
