"""bf16 is used where it was shown to purify as fp32 does, and nowhere else."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest
import torch
from torch import nn

from ebm_defense import LangevinPurifier, load_energy, load_purifier
from ebm_defense.langevin import LangevinSettings
from ebm_defense.precision import chains as module
from ebm_defense.precision.chains import (
    Finding,
    Margins,
    allowed_precision,
    check,
    finding_key,
    known_finding,
    margin_shown,
)
from ebm_defense.precision.findings import keep, say_unknown, say_used

NAMES = ["fashion-mnist-longrun"]
CHAIN = LangevinSettings(steps=4, step_size=0.05, temperature=0.0036)  # none ships for it


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ebm_defense.precision.names._has_bf16", lambda device: True)
    say_used.cache_clear()
    say_unknown.cache_clear()


@pytest.fixture
def energy():
    return load_energy("fashion-mnist-longrun")


@pytest.fixture
def images(sample):
    return sample.images[:16]


def finding(**values) -> Finding:
    known = {"equivalent": True, "steps": 10, "chains": 5, "energy": 0.0, "mean": 0.0}
    return Finding(**({**known, "spread": 0.0} | values))


def test_margin_shown_is_where_both_one_sided_tests_reject():
    d = torch.tensor([0.1, 0.3, -0.1, 0.1], dtype=torch.float64)
    expected = 0.1 + 1.645 * float(d.std()) / 2
    assert margin_shown(d) == pytest.approx(expected)
    assert margin_shown(-d) == pytest.approx(expected)


def test_margin_shown_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    draws = 2.0 + torch.randn(2000, 30, generator=generator, dtype=torch.float64)
    covered = sum(margin_shown(d) > 2.0 for d in draws) / 2000
    # 95%, a little less for n = 30 and the normal quantile; four standard errors are 2 points.
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_energies_findings_ship(name, images):
    purifier = load_purifier(name)
    key = finding_key(purifier.energy, images, purifier.settings)
    found = known_finding(key, purifier.settings.steps)
    if found is None:
        pytest.skip("no finding ships for this kind of device")
    assert found.equivalent
    assert found.chains >= 1000
    allowed = asdict(Margins())
    assert all(getattr(found, margin) <= value for margin, value in allowed.items())
    assert found.referee_fp32 < found.referee_fast
    assert purifier.resolved_precision(images) == "bf16"


@pytest.mark.parametrize("name", NAMES)
def test_a_small_check_agrees_with_what_ships(name, images):
    purifier = load_purifier(name)
    found = check(purifier.energy, images, CHAIN, chains=16)
    assert found.equivalent
    assert (found.chains, found.steps) == (16, 4)
    assert 0 < found.referee_fp32 < 1e-5 < found.referee_fast < 0.01


def test_a_precision_that_purifies_otherwise_is_not_equivalent(energy, images, monkeypatch):
    honest = module.run_chain

    def biased(x, noise, *, precision, **options):
        return honest(x, noise, precision=precision, **options) + 0.02 * (precision == "bf16")

    monkeypatch.setattr(module, "run_chain", biased)
    found = check(energy, images, CHAIN, chains=16)
    assert not found.equivalent
    assert found.mean == pytest.approx(0.01, abs=1e-3)


def test_accuracy_is_compared_where_a_classifier_is_at_hand(energy, images):
    labels = torch.zeros(16, dtype=torch.long)

    def classify(x):
        return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    found = check(energy, images, CHAIN, chains=16, classify=classify, labels=labels)
    # No discordant pair among 16 shows no more than 10 points, so far from 1.
    assert found.accuracy == pytest.approx(1.645 / 16, abs=1e-3)
    assert not found.equivalent


def test_a_finding_is_kept_and_covers_shorter_chains(energy, images):
    key = finding_key(energy, images, CHAIN)
    assert known_finding(key, 10) is None
    keep(key, finding())
    assert known_finding(key, 10) == known_finding(key, 3) == finding()
    assert known_finding(key, 11) is None


def test_what_a_finding_is_about(energy, images):
    key = finding_key(energy, images, CHAIN)
    assert finding_key(load_energy("fashion-mnist-longrun"), images, CHAIN) == key
    longer = LangevinSettings(steps=9, step_size=0.05, temperature=0.0036)
    hotter = LangevinSettings(steps=4, step_size=0.05, temperature=0.004)
    assert finding_key(energy, images, longer) == key
    assert finding_key(energy, images, hotter) != key
    with torch.no_grad():
        energy.f[0].bias[0] += 1e-3
    assert finding_key(energy, images, CHAIN) != key


@pytest.mark.parametrize(("equivalent", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_a_finding_that_was_made_and_says_which(
    energy, images, equivalent, expected, caplog
):
    chain = LangevinSettings(steps=10, step_size=0.07, temperature=0.0036)
    path = keep(finding_key(energy, images, chain), finding(equivalent=equivalent))
    with caplog.at_level(logging.INFO, "ebm_defense"):
        for _ in range(2):
            purifier = LangevinPurifier(energy, **asdict(chain))
            assert purifier.resolved_precision(images) == expected
    said = [m for r in caplog.records if "by the finding" in (m := r.getMessage())]
    assert said == [f"chains of 10 steps run in bf16, by the finding in {path}."] * equivalent


def test_auto_tries_nothing_and_writes_nothing(energy, images, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "run_chain", lambda *_, **__: pytest.fail("tried"))
    purifier = LangevinPurifier(energy, steps=10, step_size=0.07, temperature=0.0036)
    assert purifier.resolved_precision(images) == "fp32"
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_unwritable_cache_is_as_if_nothing_were_known(
    energy, images, tmp_path, caplog
):
    key = finding_key(energy, images, CHAIN)
    (tmp_path / "ebm-defense").write_text("in the way")
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        keep(key, finding())
    assert "cannot be kept" in caplog.text
    (tmp_path / "ebm-defense").unlink()
    keep(key, finding())
    file = next((tmp_path / "ebm-defense" / "precision").iterdir())
    for text in ("{", "[]", json.dumps({key: {"equivalent": True}})):
        file.write_text(text)
        assert known_finding(key, 1) is None


def test_float64_small_energies_functions_and_nothing_are_never_looked_up(images, monkeypatch):
    monkeypatch.setattr(module, "located", lambda *_: pytest.fail("looked up"))
    small = nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.Flatten(0))
    for energy in (small, lambda x: x.flatten(1).sum(1)):
        assert allowed_precision(energy, images, CHAIN) == "fp32"
    big = load_energy("fashion-mnist-longrun")
    assert allowed_precision(big, images[:0], CHAIN) == "fp32"
    assert allowed_precision(big, images, LangevinSettings(steps=0)) == "fp32"
    assert LangevinPurifier(big).resolved_precision(images.double()) == "fp64"


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_a_precision_asked_for_is_taken(asked, energy, images, monkeypatch):
    monkeypatch.setattr(module, "located", lambda *_: pytest.fail("looked up"))
    assert LangevinPurifier(energy, precision=asked).resolved_precision(images) == asked


def test_tf32_on_a_cpu_is_fp32(energy, images):
    assert LangevinPurifier(energy, precision="tf32").resolved_precision(images) == "fp32"


class TestOnAGpu:
    """A GPU that has bf16 and TF32; what a check would find is told by precision."""

    @pytest.fixture(autouse=True)
    def _gpu(self, monkeypatch):
        monkeypatch.setattr(module, "faster_precisions", lambda device: ["bf16", "tf32"])
        monkeypatch.setitem(module.CHAIN_STEPS, "cpu", module.CHAIN_STEPS["cuda"])

    @pytest.mark.parametrize(
        ("equivalent", "expected"),
        [({"bf16", "tf32"}, "bf16"), ({"tf32"}, "tf32"), (set(), "fp32")],
    )
    def test_the_fastest_that_was_shown_is_taken(self, equivalent, expected, energy, images):
        chain = LangevinSettings(steps=1500)
        for precision in ("bf16", "tf32"):
            key = finding_key(energy, images, chain, precision)
            keep(key, finding(equivalent=precision in equivalent, steps=1500))
        assert allowed_precision(energy, images, chain) == expected

    def test_published_chains_are_checked_on_enough_to_approve(self, energy, images, monkeypatch):
        """Differences as large as energies themselves, of mean 0, are within the margin."""
        started = []

        def chain(x, noise, *, settings, **_):
            started.append(len(x))
            assert settings.steps in (1500, module.REFEREED_STEPS)
            return x.clone()

        drawn = torch.Generator().manual_seed(0)
        monkeypatch.setattr(module, "run_chain", chain)
        monkeypatch.setattr(
            module, "_energies", lambda energy, x: torch.randn(len(x), generator=drawn).double()
        )
        found = check(energy, images, LangevinSettings(steps=1500))
        assert sum(started[:-3]) == 2 * module.ENOUGH
        assert 0.03 < found.energy <= Margins().energy
        assert found.equivalent


def test_where_nothing_is_known_it_is_said_once_how_to_know(energy, images, caplog):
    chain = LangevinSettings(steps=1500)
    with caplog.at_level(logging.INFO, "ebm_defense"):
        for _ in range(2):
            assert allowed_precision(energy, images, chain) == "fp32"
    assert [("`ebm-defense precision`" in r.getMessage()) for r in caplog.records] == [True]
    keep(finding_key(energy, images, chain), finding(steps=1500))
    assert allowed_precision(energy, images, chain) == "bf16"
