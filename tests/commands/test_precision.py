"""bf16 is compared where a person asks for it, and taken from then on."""

from __future__ import annotations

import pytest
import torch

from ebm_defense import load_defense
from ebm_defense.precision import chains


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: True)
    monkeypatch.setattr(chains, "SMALL", 0)


def test_what_the_command_finds_is_what_auto_takes(run, tiny_defense, sample) -> None:
    x = torch.zeros(1, 1, 8, 8)
    assert load_defense(tiny_defense).purifier.resolved_precision(x) == "fp32"
    words = ("precision", tiny_defense, "--data", "digits", "--images", 8)
    status, printed, _ = run(*words, "--device", "cpu")
    assert status == 0
    assert "chains in bf16: taken (steps 3, chains 4096, energy" in printed
    assert "verdicts in bf16: not taken (images 8, differ" in printed
    assert load_defense(tiny_defense).purifier.resolved_precision(x) == "bf16"


def test_a_defense_without_a_data_set_asks_for_one(run, tiny_defense) -> None:
    status, _, err = run("precision", tiny_defense)
    assert status == 2
    assert "give --data" in err
