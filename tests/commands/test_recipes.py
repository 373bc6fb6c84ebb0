"""Recipes are TOML files that can be read, copied and changed, and say what the papers say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebm_defense.commands.main import parse
from ebm_defense.commands.training.train_ebm import TrainEbm, tell_lifetime
from ebm_defense.errors import UsageError
from ebm_defense.learning.energies.recipes import recipe_file, recipe_names
from ebm_defense.learning.energies.registry import OBJECTIVES, STARTS


def train(*words: str) -> TrainEbm:
    return parse(TrainEbm, "train-ebm", ["--out", "somewhere", *words])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_one_of_this_command(name: str) -> None:
    command = train("--recipe", name)
    recipe = command.settings()
    assert command.recipe == name
    assert recipe.start in STARTS
    assert recipe.fresh in STARTS
    assert recipe.objective in OBJECTIVES
    assert recipe.langevin.steps >= 50
    # σ ≥ ε (Nijkamp et al. 2019).
    assert recipe.data_noise >= recipe.langevin.step_size
    assert recipe_file(name).read_text(encoding="utf-8").startswith("# ")


def test_published_numbers_are_the_published_ones() -> None:
    hill = train("--recipe", "hill2021").settings()
    assert (hill.langevin.steps, hill.updates, hill.sgd_from) == (100, 250_000, 125_000)
    # x ← x − ∇U(x) + ε·z
    assert hill.langevin.drift == pytest.approx(1.0)
    midrun = train("--recipe", "midrun").settings()
    assert midrun.langevin.steps / midrun.rejuvenation == pytest.approx(4000)
    assert [midrun.rate(u) for u in (0, 50_000, 75_000, 100_000, 149_999)] == pytest.approx(
        [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    )


def test_options_go_before_the_recipe_and_files_are_recipes_too(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        recipe_file("midrun").read_text(encoding="utf-8").replace("width = 256", "width = 3"),
        encoding="utf-8",
    )
    command = train("--recipe", str(own), "--updates", "5")
    assert (command.width, command.updates, command.batch) == (3, 5, 128)
    assert command.out == Path("somewhere")


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe 'nothing'; choose one of anatomy"):
        train("--recipe", "nothing")
    (tmp_path / "wrong.toml").write_text("wdith = 3", encoding="utf-8")
    with pytest.raises(UsageError, match="wdith: unknown key"):
        train("--recipe", str(tmp_path / "wrong.toml"))
    with pytest.raises(UsageError, match="leave one of them out"):
        train("--recipe", "midrun", "--config", str(recipe_file("midrun")))


def test_lifetimes_stand_beside_the_purification(capsys, caplog) -> None:
    tell_lifetime(2000, 1500)
    assert capsys.readouterr().out == (
        "chains live 2,000 steps on average; the energy shall purify by 1,500 steps\n"
    )
    assert not caplog.records
    tell_lifetime(2000, 100)
    tell_lifetime(float("inf"), None)
    tell_lifetime(0.0, 5)
    assert "chains live for good" in capsys.readouterr().out
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "chains of learning live 2,000 steps on average, but purification takes 100 steps"
    ]
