"""Every objective is reached from the command line, and goes on exactly where it was stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebm_defense.learning.energies.registry import OBJECTIVES

LEARN = (
    *("train-ebm", "--data", "digits", "--images", 40, "--width", 2, "--batch", 8, "--bank", 16),
    *("--langevin-steps", 2, "--chain-lengths", 2, "--activation", "silu", "--device", "cpu"),
    *("--noise-levels", 0.1, 0.3),
)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_reached_by_its_name(objective: str, run, tmp_path: Path) -> None:
    assert run(*LEARN, "--objective", objective, "--updates", 1, "--out", tmp_path)[0] == 0
    assert (tmp_path / "energy.safetensors").is_file()


def test_it_resumes_exactly_with_all_that_it_has_learned(run, tmp_path: Path) -> None:
    words = (*LEARN, "--objective", "score-matching", "--loss-shape", "adaptive")
    assert run(*words, "--updates", 4, "--final-lr", 2e-4, "--out", tmp_path / "whole")[0] == 0
    for updates in (2, 4):
        part = (*words, "--updates", updates, "--final-lr", 2e-4, "--out", tmp_path / "parts")
        assert run(*part, "--resume")[0] == 0
    for file in ("energy.safetensors", "history.csv"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


def test_an_unknown_objective_is_refused(run, tmp_path: Path) -> None:
    status, _, error = run(*LEARN, "--objective", "guessing", "--out", tmp_path)
    assert status == 2
    assert "choose one of likelihood, contrastive-divergence, score-matching" in error


def test_chains_of_learning_can_be_adjusted(run, tmp_path: Path) -> None:
    assert run(*LEARN, "--updates", 1, "--adjusted", "--out", tmp_path)[0] == 0
