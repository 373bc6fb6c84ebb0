"""One call from a model to its accuracies."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from ebm_defense import (
    ConvEnergy,
    ConvEnergySettings,
    LangevinPurifier,
    PurifiedClassifier,
    UsageError,
    load_data,
)
from ebm_defense.attacks.gradients.registry import choose_auto
from ebm_defense.eval import benchmark, load_run


def centroids(x):
    """A linear classifier of the digits: the nearest class mean."""
    images, labels = load_data("digits", split="train")
    means = torch.stack([images[labels == c].mean(0) for c in range(10)]).flatten(1)
    return x.flatten(1) @ means.T - means.square().sum(1) / 2


def test_a_function_is_benchmarked_in_one_call(tmp_path):
    clean, robust, report = benchmark(centroids, 20, "digits", eps=0.1, out=tmp_path / "run")
    images, labels = load_data("digits", split="test", limit=20)
    assert clean == pytest.approx(float((centroids(images).argmax(1) == labels).double().mean()))
    assert 0.0 < robust < clean
    assert robust == report.robust().value
    assert report.protocol.attacks[0].threat.eps == 0.1
    assert load_run(tmp_path / "run").robust() == report.robust()


def test_robust_accuracy_needs_an_image_to_stand_under_every_attack():
    report = benchmark(centroids, 10, "digits", eps=0.1, protocol="hill2021").report
    records = report.records
    first, second = [c for c in records if c.endswith(": stands")]
    records[first], records[second] = [1] * 6 + [0] * 4, [0] * 3 + [1] * 7
    assert report.robust().value == 0.3


def test_standard_takes_the_gradient_that_fits_the_energy(monkeypatch):
    def only_look(model, images, labels, protocol, **options):
        attacks = choose_auto(protocol.attacks, model, images)
        raise UsageError(" ".join({type(a.gradient).__name__ for a in attacks[2:6]}))

    module = importlib.import_module("ebm_defense.eval.benchmark")
    monkeypatch.setattr(module, "evaluate", only_look)
    for activation, gradient in (("leaky_relu", "Smoothed"), ("soft_lrelu", "Full")):
        shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
        model = PurifiedClassifier(nn.Flatten(), LangevinPurifier(ConvEnergy(shape), 2))
        with pytest.raises(UsageError, match=f"^{gradient}$"):
            benchmark(model, 4, "digits", protocol="standard")


def test_an_unknown_data_set_is_refused():
    with pytest.raises(UsageError, match="unknown data set"):
        benchmark(centroids, 10, "nowhere")
