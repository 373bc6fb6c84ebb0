"""Verdicts are passed in bf16 where it names the same classes, and nothing else ever is."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ebm_defense import PurifiedClassifier, load_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.noise import chain_keys
from ebm_defense.precision import classifiers as module
from ebm_defense.precision.classifiers import (
    MARGIN,
    PAIRS,
    Agreement,
    agreement_key,
    allowed_verdicts,
    compare,
)
from ebm_defense.precision.findings import keep, look_up, say_used
from ebm_defense.purifiers.baselines import BitDepth, GaussianNoise
from ebm_defense.storage.folders import shipped

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: True)
    say_used.cache_clear()


class Net(nn.Module):
    """Large enough to be worth it; in bf16 it names another class for the first few images."""

    def __init__(self, wrong: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 784 * 16))
        self.wrong, self.reduced = wrong, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.reduced.append(torch.is_autocast_enabled("cpu"))
        logits = x.flatten(1)[:, :10] + 0.0 * self.weight.sum()
        if self.reduced[-1]:
            logits[: self.wrong] = logits[: self.wrong].roll(1, 1)
        return logits


class Fails(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise LookupError("no kernel\nfor this")
        return super().forward(x)


def images_of(count: int = PAIRS) -> torch.Tensor:
    return torch.rand((count, 1, 28, 28), generator=torch.Generator().manual_seed(0))


def defense_of(net: nn.Module, purifier: object = None, **options) -> PurifiedClassifier:
    return PurifiedClassifier(net, purifier or GaussianNoise(0.1), 2, seed=0, **options)


@pytest.mark.parametrize(("wrong", "equivalent"), [(0, True), (1, True), (2, False), (9, False)])
def test_the_margin_is_of_the_share_of_images_that_get_another_class(wrong, equivalent):
    found = compare(Net(wrong), images_of())
    share, n = wrong / PAIRS, PAIRS
    error = ((share + 1 / n - share**2) / n) ** 0.5  # one image more than were seen
    assert found.images == PAIRS
    assert found.differ == pytest.approx(share + 1.645 * error)
    assert found.equivalent is equivalent is (found.differ <= MARGIN)


@pytest.mark.parametrize("name", [s.name for s in shipped()])
def test_the_shipped_classifiers_findings_ship(name, sample):
    defense = load_defense(name)
    found = next(look_up(agreement_key(defense.classifier, CPU), Agreement), None)
    if found is None:
        pytest.skip("no finding ships for this kind of device")
    assert found.equivalent
    assert found.images >= 1000
    assert found.differ <= MARGIN
    assert defense.resolved_verdict_precision(sample.images) == "bf16"


@pytest.mark.parametrize(("equivalent", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_a_finding_that_was_made_and_says_which(equivalent, expected, caplog):
    path = keep(agreement_key(Net(), CPU), _found(equivalent))
    with caplog.at_level(logging.INFO, "ebm_defense"):
        assert [allowed_verdicts(Net(), CPU) for _ in range(3)] == [expected] * 3
    said = [r.getMessage() for r in caplog.records]
    assert said == ([f"verdicts are passed in bf16, by the finding in {path}."] * equivalent)


def test_a_finding_is_of_its_weights():
    net = Net()
    key = agreement_key(net, CPU)
    assert agreement_key(Net(), CPU) == key
    with torch.no_grad():
        net.weight[0, 0] = 1.0
    assert agreement_key(net, CPU) != key


def test_a_classifier_that_fails_in_bf16_is_not_equivalent(caplog):
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        found = compare(Fails(), images_of(3))
    assert (found.equivalent, found.differ) == (False, 1.0)
    assert [r.getMessage() for r in caplog.records] == [
        "the classifier fails in bf16 (LookupError: no kernel)."
    ]


def test_auto_tries_nothing_writes_nothing_and_sees_new_weights(monkeypatch, tmp_path):
    net = Net()
    defense = defense_of(net)
    assert defense.resolved_verdict_precision(images_of(3)) == "fp32"
    assert not net.reduced
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        net.weight.add_(1.0)
    keep(agreement_key(net, CPU), _found(True))
    assert defense.resolved_verdict_precision(images_of(3)) == "bf16"


def _found(equivalent: bool) -> Agreement:
    return Agreement(equivalent=equivalent, images=PAIRS, differ=0.0)


def test_what_gains_nothing_is_never_looked_up(monkeypatch):
    monkeypatch.setattr(module, "located", lambda *_: pytest.fail("looked up"))
    small = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    x = images_of(3)
    for net, purifier, images, expected in (
        (small, None, x, "fp32"),
        (Net(), BitDepth(3), x, "fp32"),  # one pass of it says all
        (Net(), None, x[:0], "fp32"),
        (Net().double(), None, x.double(), "fp64"),
    ):
        defense = defense_of(net, purifier)
        defense.check_deterministic(images)
        assert defense.resolved_verdict_precision(images) == expected
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: False)
    assert defense_of(Net()).resolved_verdict_precision(x) == "fp32"


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_a_precision_asked_for_is_taken(asked, monkeypatch):
    monkeypatch.setattr(module, "located", lambda *_: pytest.fail("looked up"))
    net = Net()
    draw_logits(defense_of(net, verdict_precision=asked), images_of(3), range(3), Stream(0, "t", 2))
    assert net.reduced == [asked == "bf16"]


def test_an_unknown_precision_is_refused():
    with pytest.raises(UsageError, match=r"tf32.*auto, fp32, bf16"):
        defense_of(Net(), verdict_precision="tf32")


def test_a_verdict_sees_the_images_that_any_other_pass_sees_in_bf16(shipped, sample):
    x, keys = sample.images[:3], chain_keys(0, "test", range(3), range(2))
    shipped.verdict_precision = "bf16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = shipped.classify_replicates(shipped.purify_replicates(x, keys)).float()
    found = shipped.verdict_logits(x, keys)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, shipped.replicate_logits(x, keys))


def test_gradients_scores_and_calls_are_never_reduced():
    net = Net()
    defense = defense_of(net, verdict_precision="bf16")
    x, keys = images_of(3), chain_keys(0, "test", range(3), range(2))
    defense(x.requires_grad_()).sum().backward()
    with torch.no_grad():
        defense(x)
        defense.replicate_logits(x, keys)
    assert net.reduced == [False] * 3


def test_what_attacks_see_is_not_reduced_and_what_the_judge_sees_is(monkeypatch):
    from ebm_defense.attacks import PGD, ThreatModel
    from ebm_defense.eval import evaluate

    monkeypatch.setattr(module, "located", lambda *_: iter([(_found(True), "here")]))
    seen = []

    class Watched(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
            return super().forward(x) + 1e-3 * x.flatten(1).sum(1, keepdim=True)

    attack = PGD(threat=ThreatModel(eps=0.1), steps=1, step_size=0.05, replicates=2)
    defense = defense_of(Watched())
    x = images_of(2)
    report = evaluate(defense, x, torch.tensor([0, 1]), attacks=[attack], judge_replicates=2)
    assert (True, True) not in seen
    assert (True, False) in seen
    assert report.settings["defense"]["verdicts"] == "bf16"
    assert "verdicts in bf16." in report.caption()
