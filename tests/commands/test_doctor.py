"""`ebm-defense doctor`: what this machine has, checked."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from ebm_defense.commands.machine import doctor
from ebm_defense.precision.devices import SelfCheck

PASSED = SelfCheck(errors={"gradient in fp32": 3e-7, "chains' moments": 2.0})
FAILED = SelfCheck(errors={"gradient in fp32": 3e-3, "chains' moments": 2.0})
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Say what is found of the CPU, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EBM_DEFENSE_DATA", raising=False)

    def say(check: SelfCheck) -> None:
        monkeypatch.setattr(doctor, "checked_device", lambda device, again: check)

    say(PASSED)
    return say


def test_the_page_says_what_a_bug_report_needs(run, found, tmp_path):
    status, page, _ = run("doctor", "--out", tmp_path / "page.md")
    assert status == 0
    for package in ("ebm-defense", "torch", "numpy"):
        assert f"{package} {importlib.metadata.version(package)}" in page
    for section in ("Versions", "cpu", "Data sets", "Extras", "Folders", "Recommendation"):
        assert f"## {section}" in page
    assert "| gradient in fp32 | 3e-07 | 1e-05 | passes |" in page
    assert str(tmp_path / "ebm-defense") in page
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


def test_a_failed_check_is_named_and_is_the_status(run, found):
    found(FAILED)
    status, page, _ = run("doctor")
    assert status == 1
    assert "| gradient in fp32 | 0.003 | 1e-05 | FAILS |" in page
    assert "fails its check (off by 0.003, above 1e-05); gradients in it are autograd's" in page
    assert "report this page" in page.partition("## Recommendation")[2]


def test_devices_are_checked_anew_where_that_is_asked(run, found, monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "checked_device", lambda d, again: asked.append(again) or PASSED)
    run("doctor")
    run("doctor", "--again")
    assert asked == [False] * (len(asked) // 2) + [True] * (len(asked) // 2)


def test_data_sets_are_found_where_they_lie(found, tmp_path, monkeypatch):
    (tmp_path / "ebm-defense" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("EBM_DEFENSE_DATA", str(tmp_path / "mine"))
    (tmp_path / "mine" / "MNIST" / "raw").mkdir(parents=True)
    lines = "\n".join(doctor.data_lines())
    assert f"- cifar10: {tmp_path / 'ebm-defense' / 'cifar-10-batches-py'}" in lines
    assert f"- mnist: {tmp_path / 'mine' / 'MNIST' / 'raw'}" in lines
    assert "- svhn: not here" in lines


@pytest.mark.parametrize(
    ("devices", "driver", "bf16", "words"),
    [
        ({CPU: PASSED, GPU: PASSED}, "590.1", True, "gpu_certify.sh"),
        ({CPU: PASSED, GPU: FAILED}, "590.1", True, "cuda:0 fails a check"),
        ({CPU: PASSED}, "590.1", True, "install a torch built for CUDA"),
        ({CPU: PASSED}, "none", True, "bench --quick"),
        ({CPU: PASSED}, "none", False, "no bf16"),
    ],
)
def test_it_recommends_the_one_thing_to_do(devices, driver, bf16, words, monkeypatch):
    monkeypatch.setattr(doctor, "driver", lambda: driver)
    monkeypatch.setattr(doctor, "resolve_precision", lambda *_: "bf16" if bf16 else "fp32")
    assert words in doctor.recommendation(devices)
