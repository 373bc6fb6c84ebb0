"""`ebm-defense signal`."""

from __future__ import annotations

import pytest

SMALL = ("--data", "digits", "--images", 2, "--replicates", 1, 2)


@pytest.mark.parametrize("gradient", ["bpda", "full", "smoothed(width=1, stride=2)"])
def test_it_prints_a_row_for_each_number_of_replicates(run, tiny_defense, gradient) -> None:
    status, printed, _ = run("signal", "--defense", tiny_defense, *SMALL, "--gradient", gradient)
    assert status == 0
    first, head, *rows = printed.splitlines()
    assert "2 images" in first
    assert "signal-to-noise" in head
    assert [row.split()[0] for row in rows] == ["1", "2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gradient", "magic"), "unknown gradient 'magic'"),
        (("--average", "votes"), "a loss averages"),
        (("--purifier", "none"), "deterministic"),
        (("--purifier", "jpeg:75"), "deterministic"),
        (("--replicates", 0), "at least 1"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(run, tiny_defense, words, said) -> None:
    status, _, err = run("signal", "--defense", tiny_defense, *SMALL, *words)
    assert status == 2
    assert said in err
