"""Accuracy under common corruptions."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ebm_defense import PurifiedClassifier, UsageError
from ebm_defense.data import Images
from ebm_defense.eval import corruptions as module
from ebm_defense.eval.corruptions import evaluate_corruptions
from ebm_defense.eval.judging.statistics import share
from ebm_defense.eval.reporting.corruption_report import CorruptionReport
from ebm_defense.purifiers.baselines import GaussianNoise

FEW = {"corruptions": ["brightness", "fog"], "severities": (1, 5), "replicates": 2}


@pytest.fixture
def images():
    return torch.rand((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.fixture
def bright(two_class):
    """Class 1 where the mean pixel is above one half."""
    return two_class(torch.ones((1, 8, 8)) / 64, -0.5)


def test_each_cell_is_the_share_of_images_that_are_right(bright, images) -> None:
    labels = bright(images).argmax(1)
    report = evaluate_corruptions(bright, images, labels, **FEW)
    assert report.mean("defended", "clean")[0] == 1.0
    by_hand = bright((images + 0.3).clamp(max=1.0)).argmax(1) == labels
    cells = report.cells().set_index(["corruption", "severity"])
    assert cells.loc[("brightness", 5), "defended"] == pytest.approx(float(by_hand.float().mean()))
    four = report.cells()["defended"][1:]
    assert report.mean()[0] == pytest.approx(four.mean())
    table = report.table()
    assert table["corruption"].tolist() == ["clean", "brightness", "fog", "mean"]
    assert "2 corruptions at severities 1, 5" in report.to_markdown()


def test_a_stopped_run_goes_on_and_ends_with_the_same_files(
    bright, images, labels, tmp_path, monkeypatch
) -> None:
    def defense() -> PurifiedClassifier:
        return PurifiedClassifier(bright, GaussianNoise(0.3), replicates=2)

    whole = evaluate_corruptions(defense(), images, labels, **FEW, out=tmp_path / "whole")
    measured, calls = module._measure, []

    def stops(*given, **more):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(*given, **more)

    monkeypatch.setattr(module, "_measure", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(defense(), images, labels, **FEW, out=tmp_path / "parts")
    evaluate_corruptions(defense(), images, labels, **FEW, out=tmp_path / "parts")
    assert len(calls) == 3 + 3  # two were kept, three were left
    for file in ("records.csv", "cells.csv", "table.md", "settings.toml"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    again = evaluate_corruptions(defense(), images, labels, **FEW, out=tmp_path / "parts")
    pd.testing.assert_frame_equal(again.records, whole.records)
    with pytest.raises(UsageError, match="other settings"):
        evaluate_corruptions(defense(), images, labels, **FEW, seed=1, out=tmp_path / "parts")


def test_images_may_come_from_elsewhere(bright, images, labels) -> None:
    def make(name, severity) -> Images:
        return Images(torch.full_like(images, 0.2 * severity), torch.ones(6, dtype=torch.long))

    report = evaluate_corruptions(
        bright, images, labels, corruptions=["haze"], severities=(1, 2, 3, 4, 5), make=make
    )
    assert report.cells()["defended"].tolist() == [0, 0, 1, 1, 1]
    assert "clean" not in set(report.records["corruption"])


def report_of(right: list[int]) -> CorruptionReport:
    """Report these outcomes, an image each, under one corruption."""
    records = {"corruption": "fog", "severity": 1, "image": range(len(right)), "defended": right}
    return CorruptionReport(records=pd.DataFrame(records), caption="")


def test_the_interval_of_a_mean_is_wilsons_and_never_empty() -> None:
    found, known = report_of([1] * 7 + [0] * 3).mean(), share(7, 10)
    assert found == pytest.approx((0.7, known.low, known.high))
    mean, low, high = report_of([1] * 20).mean()
    assert (mean, high) == (1.0, pytest.approx(1.0))
    assert low < 0.9


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"corruptions": ["haze"]}, "unknown corruption 'haze'"),
        ({"severities": (6,)}, "from 1 to 5"),
        ({"severities": ()}, "at least one"),
        ({"corruptions": []}, "at least one"),
    ],
)
def test_mistakes_are_named(bright, images, labels, more, said) -> None:
    with pytest.raises(UsageError, match=said):
        evaluate_corruptions(bright, images, labels, **(FEW | more))
