"""Attacks are ranked by what they leave of the images that all of them had."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from ebm_defense.attacks import ThreatModel
from ebm_defense.errors import UsageError
from ebm_defense.eval import ranking as module
from ebm_defense.eval.ranking import Contest, Field, Outcome, compete, ranking

THREAT = ThreatModel(eps=0.1)


def outcome(name: str, stands: list[float], steps: float = 0.0, seconds: float = 0.0) -> Outcome:
    return Outcome(name, pd.Series(stands), steps, seconds)


def test_the_strongest_on_shared_images_is_first_and_the_worst_of_all_last() -> None:
    around = outcome("around", [1, 1, 1, 0, 0, 0], steps=60.0, seconds=6.0)
    strong = outcome("strong", [0, 1, 1], steps=30.0, seconds=1.5)
    weak = outcome("weak", [1, 1, 0], steps=3.0)
    worst = outcome("worst of all", [0, 1, 0.5], steps=6.0)
    table = ranking([around, weak, strong, worst])
    # Of the three that all had, around leaves 3, the others 2; of those two the cheaper is first.
    assert list(table["attack"]) == ["weak", "strong", "around", "worst of all"]
    assert list(table["robust % of the first 3"]) == ["66.7", "66.7", "100.0", "50.0"]
    assert list(table["robust %"]) == ["66.7", "66.7", "50.0", "50.0"]
    assert list(table["BPDA on these %"]) == ["100.0", "100.0", "50.0", "100.0"]
    assert list(table["chain-steps an image"]) == ["1", "10", "10", "2"]
    assert list(table["images"]) == ["3", "3", "6", "3"]


def test_dearer_attacks_get_the_first_images_and_finished_ones_are_not_run_again(
    langevin_defense, tmp_path
) -> None:
    defense = langevin_defense(steps=2, replicates=2)
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = defense(images).argmax(1)
    contests = [
        Contest("pgd(steps=1, replicates=1)", 4),
        Contest("apgd(steps=1, replicates=1)", 2),
    ]

    def run() -> list[Outcome]:
        found = compete(
            defense, images, labels, contests, threat=THREAT, judge_replicates=2, out=tmp_path
        )
        return list(found)

    def shards() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shards/*")}

    first, written = run(), shards()
    assert [len(o.stands) for o in first] == [4, 2, 2]  # the last is the worst of all
    assert len({p.parent for p in written}) == 2
    # The worst of all is judged anew, in time of its own.
    again, before = (ranking(o).drop(columns="seconds an image") for o in (run(), first))
    assert again.equals(before)
    assert shards() == written


def test_every_attack_is_made_before_the_first_one_runs(
    langevin_defense, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("ran"))
    contests = [Contest("pgd(steps=1)", 1), Contest("no-such-attack", 1)]
    images, labels = torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UsageError, match="unknown attack 'no-such-attack'"):
        list(compete(langevin_defense(), images, labels, contests, threat=THREAT, out=tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradients": ("full",), "images": (8, 16, 4)}, "none larger"),
        ({"gradients": ("full",), "images": (8, 4, 0)}, "above 0"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(settings, message) -> None:
    with pytest.raises(UsageError, match=message):
        Field(**settings)


def test_without_a_gradient_through_the_purifier_the_others_go_around_it() -> None:
    names = [c.attack for c in Field().contests()]
    assert len(set(names)) == len(names)
    hammer = next(n for n in names if n.startswith("diffhammer"))
    assert hammer.endswith("gradient=bpda())")


def test_a_field_holds_every_kind_of_attack_once() -> None:
    contests = Field(gradients=("full", "surrogate(steps=3)"), also=("bpda(steps=9)",)).contests()
    names = [c.attack for c in contests]
    assert len(set(names)) == len(names)
    assert names[0].startswith("pgd(")
    assert "gradient=bpda()" in names[0]
    assert {n.partition("(")[0] for n in names} == {
        "pgd", "apgd", "apgd-t", "bpda", "diffhammer", "spsa", "square", "transfer",
    }  # fmt: skip
    assert sum("gradient=surrogate(steps=3)" in n for n in names) == 4
