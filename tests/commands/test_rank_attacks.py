"""`ebm-defense rank-attacks`."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ebm_defense.commands.evaluation.rank_attacks import fitting
from ebm_defense.storage.weights import load_defense

SMALL = (
    "--data", "digits", "--images", 3, 2, 1, "--steps", 1, "--replicates", 1,
    "--judge-replicates", 2,
)  # fmt: skip


def test_it_ranks_those_asked_for_beside_bpda(run, tiny_defense, tmp_path) -> None:
    chosen = ("--gradient", "full", "--only", "transfer", "--eps", 0.1)
    words = ("--defense", tiny_defense, *SMALL, *chosen)
    status, printed, _ = run("rank-attacks", *words, "--out", tmp_path)
    assert status == 0
    table = pd.read_csv(tmp_path / "ranking.csv")
    names = [name.partition("(")[0] for name in table["attack"]]
    assert sorted(names) == ["pgd", "transfer", "worst of all"]
    assert list(table["attack"])[-1] == "worst of all"
    assert "robust % of the first 3" in table
    text = (tmp_path / "ranking.md").read_text()
    assert text in printed
    assert "2 fresh replicates" in text
    assert "Linf 0.1" in text


def test_the_gradients_that_fit_are_taken_if_none_is_named() -> None:
    images = torch.full((1, 1, 28, 28), 0.5)
    found = {
        name: fitting(load_defense(name, seed=0), images)
        for name in ("fashion-mnist", "fashion-mnist-longrun", "fashion-mnist-gaussian")
    }
    assert found == {
        "fashion-mnist-longrun": ("smoothed", "surrogate(steps=10, through=smoothed())"),
        "fashion-mnist": ("full",),
        "fashion-mnist-gaussian": ("full",),
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "magic"), "no attack's name begins with magic"),
        (("--gradient", "magic"), "unknown gradient 'magic'"),
        (("--also", "magic"), "unknown attack 'magic'"),
        (("--images", 1, 2, 3), "none larger"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(run, tiny_defense, tmp_path, words, said) -> None:
    status, _, err = run(
        "rank-attacks", "--defense", tiny_defense, *SMALL, *words, "--out", tmp_path
    )
    assert status == 2
    assert said in err
