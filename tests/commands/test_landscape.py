"""`landscape`: the picture, the numbers, and what it says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from ebm_defense.errors import UsageError
from ebm_defense.eval.mixing import class_mixing, starts_to_mix
from ebm_defense.eval.reporting.figures.landscape import places
from ebm_defense.landscape import Landscape
from ebm_defense.purifiers.base import SteppedPurifier

FEW = (
    *("--images", 3, "--descent", 2, "--most", 3, "--pulls", 1, "--patience", 2),
    *("--mixing-images", 4, "--mixing-steps", 3),
)


def test_the_command_draws_a_tree_and_says_when_classes_mix(run, tmp_path: Path) -> None:
    status, out, _ = run("landscape", "fashion-mnist-longrun", "--out", tmp_path, *FEW)
    assert status == 0
    assert "3 minima in 3 metastable basins" in out
    assert "no classes mix up to K = 3" in out
    assert (tmp_path / "landscape.png").stat().st_size > 10_000
    found = tomllib.loads((tmp_path / "landscape.toml").read_text())
    assert len(found["tree"]) == 2
    assert len(found["barriers"]) == 3
    assert found["minimum_of_image"] == [0, 1, 2]
    assert found["attraction"]["temperature"] == 0.0036


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("fashion-mnist-longrun", "--images", 1), "2 images or more"),
        (("fashion-mnist-longrun", "--reach", 0), "must be above 0"),
        (("fashion-mnist-gaussian",), "has no energy"),
    ],
)
def test_the_command_refuses_in_one_sentence(more, words, run, tmp_path: Path) -> None:
    status, _, err = run("landscape", *more, "--out", tmp_path / "out")
    assert status == 2
    assert words in err


class Drift(SteppedPurifier):
    """Adds a tenth a step, so that a threshold on the mean is passed at a known one."""

    def __init__(self):
        super().__init__()
        self.chain_steps = 10

    def advance(self, x, noise, steps):
        return x + 0.1 * len(steps)


def test_classes_mix_at_the_step_that_takes_them_over_the_border() -> None:
    images = torch.tensor([0.1, 0.2, 0.3, 0.9] * 10).view(-1, 1, 1, 1)

    def classify(x):
        over = x.mean((1, 2, 3)) - 0.55
        return torch.stack([-over, over], 1)

    found = class_mixing(Drift(), classify, images, lengths=[0, 2, 3, 4, 9], replicates=2)
    assert [m.moved.value for m in found] == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert found[3].moves == {(0, 1): 40}  # 20 images by two chains each
    assert starts_to_mix(found) is found[2]
    assert starts_to_mix(found[:2]) is None
    with pytest.raises(UsageError, match="rising order"):
        class_mixing(Drift(), classify, images, lengths=[3, 2])


def test_branches_of_the_picture_do_not_cross() -> None:
    """What joins first stands side by side."""
    barriers = torch.tensor(
        [[0.0, 9, 1, 9], [9, 0, 9, 2], [1, 9, 0, 9], [9, 2, 9, 0]]
    )  # fmt: skip
    found = Landscape(
        minima=torch.zeros(4, 1, 2, 2), energies=torch.zeros(4), start=torch.arange(4),
        crossed=torch.eye(4, dtype=torch.bool), barriers=barriers,
    )  # fmt: skip
    at = places(found)
    assert abs(at[0] - at[2]) == abs(at[1] - at[3]) == 1
    assert sorted(at[k] for k in range(4)) == [0, 1, 2, 3]
