from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch

from ebm_defense.commands.diagnose import _lifetime
from ebm_defense.commands.options.subject import Subject, lived
from ebm_defense.commands.training.train_ebm import TrainEbm
from ebm_defense.langevin import LangevinSettings
from ebm_defense.storage.folders import write_sums

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
    assert "after 60 steps" in printed
    assert "chains from data keep their image's class" in printed
    assert "in learning's second half d_s is" in printed
    assert found["kept"]["steps"][0] == 0
    assert 0 <= found["kept"]["classes"][-1] <= 1
    assert (out / "diagnosis.png").read_bytes()[:4] == b"\x89PNG"


def test_purification_of_another_length_than_learning_s_is_warned_of() -> None:
    history = pd.DataFrame({"update": [1], "d_s": [0.0], "r_s": [0.0]})
    subject = Subject(torch.nn.Identity(), LangevinSettings(), 100, 0.1, history)
    assert (
        "chains lived 100 steps in learning, far longer ones purify" in _lifetime(500, subject)[0]
    )
    assert "far shorter ones purify" in _lifetime(10, subject)[0]
    assert _lifetime(60, subject) == []
    assert _lifetime(500, subject._replace(history=None)) == []


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"rejuvenation": 0.05, "bank": 100}, 400),
        ({"rejuvenation": 0.0, "bank": 200}, 20 * 50),  # visited 100·100/200 times
        ({"rejuvenation": 0.0, "bank": 200, "start": "noise"}, 20),
        ({"rejuvenation": 0.05, "bank": 200, "start": "burn-in", "burn_in_visits": 7}, 280),
    ],
)
def test_how_long_chains_lived_is_read_off_the_settings(settings, steps) -> None:
    options = {"langevin_steps": 20, "updates": 100, "batch": 100} | settings
    assert lived(TrainEbm(out=Path("somewhere"), **options)) == steps


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


def test_an_energy_alone_can_be_given_on_with_its_recipe(run, tiny_defense, tmp_path) -> None:
    learned, given = tmp_path / "learned", tmp_path / "given"
    assert run("train-ebm", *words(LEARN), "--out", learned)[0] == 0
    given.mkdir()
    shutil.copy(learned / "energy.safetensors", given)
    options = {k[2:].replace("-", "_"): v for k, v in LEARN.items() if k != "--chain-lengths"}
    recipe = [f"{k} = {v!r}" for k, v in options.items()]
    (given / "recipe.toml").write_text("\n".join(recipe))
    write_sums(given)
    asked = [*words(DIAGNOSE), "--classifier", tiny_defense, "--out", tmp_path / "out"]
    assert run("diagnose", given, *asked)[0] == 0
    assert tomllib.loads((tmp_path / "out" / "diagnosis.toml").read_text())["learned_steps"] == 4
    assert run("checkpoints", "verify", given)[0] == 0
    (given / "recipe.toml").write_text("width = 3")
    status, _, error = run("diagnose", given, *asked)
    assert status == 2
    assert "recipe.toml is not the file that SHA256SUMS lists" in error
