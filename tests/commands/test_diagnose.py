from __future__ import annotations

import tomllib
from pathlib import Path

LEARN = {
    "--data": "digits",
    "--images": 60,
    "--width": 2,
    "--updates": 4,
    "--batch": 8,
    "--bank": 16,
    "--langevin-steps": 2,
    "--rejuvenation": 0.5,
    "--chain-lengths": 2,
    "--device": "cpu",
}
DIAGNOSE = {
    "--data": "digits",
    "--images": 8,
    "--steps": 60,
    "--attack-steps": 1,
    "--device": "cpu",
}


def words(options: dict[str, object]) -> list[object]:
    return [word for pair in options.items() for word in pair]


def test_an_energy_that_was_just_learned_is_diagnosed(run, tiny_defense, tmp_path: Path) -> None:
    learned, out = tmp_path / "learned", tmp_path / "diagnosis"
    assert run("train-ebm", *words(LEARN), "--out", learned)[0] == 0
    asked = [learned, "--classifier", tiny_defense, *words(DIAGNOSE), "--out", out]
    status, printed, _ = run("diagnose", *asked)
    assert status == 0
    assert printed.startswith("verdict: ")
    assert "purify by" in printed
    found = tomllib.loads((out / "diagnosis.toml").read_text())
    assert found["learned_steps"] == 4  # K/p
    assert found["convergence"]["verdict"] in printed
    assert (out / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"


def test_adjusted_chains_say_how_many_steps_are_accepted(run, tiny_defense, tmp_path) -> None:
    asked = [tiny_defense, "--adjusted", *words(DIAGNOSE), "--classifier", tiny_defense]
    status, printed, _ = run("diagnose", *asked, "--out", tmp_path)
    assert status == 0
    share = tomllib.loads((tmp_path / "diagnosis.toml").read_text())["convergence"]["acceptance"]
    assert 0 < share <= 1
    assert f"; {share:.1%} of steps are accepted" in printed


def test_chains_shorter_than_those_of_learning_are_refused(run, tiny_defense, tmp_path) -> None:
    asked = [tiny_defense, "--learned-steps", 100, *words(DIAGNOSE), "--out", tmp_path / "never"]
    status, _, error = run("diagnose", *asked)
    assert status == 2
    assert "give 1000 or more" in error
    assert not (tmp_path / "never").exists()


def test_what_holds_no_energy_is_refused(run, tmp_path) -> None:
    status, _, error = run("diagnose", tmp_path, "--out", tmp_path / "never")
    assert status == 2
    assert "there is no defense" in error
