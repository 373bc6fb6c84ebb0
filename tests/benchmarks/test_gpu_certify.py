"""The certificate runs to its end anywhere, and names what it cannot show and what fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NEEDS_A_GPU = ("tests", "graphs", "verdicts", "memory", "hours", "sanitizer")


@pytest.fixture
def certify(benchmark, monkeypatch):
    script = benchmark("gpu_certify")
    monkeypatch.setattr(script, "FAILED", [])
    return script


def go(script, tmp_path, *words) -> str:
    folders = ["--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert script.main(script.Certify, [*folders, *words]) == 0
    (file,) = (tmp_path / "results").iterdir()
    return file.read_text(encoding="utf-8")


def test_without_a_gpu_each_step_that_needs_one_is_named(certify, tmp_path, capsys):
    page = go(certify, tmp_path, "--cpu", "--only", ",".join(NEEDS_A_GPU))
    printed = capsys.readouterr().out
    for name in NEEDS_A_GPU:
        assert f"CANNOT {name}: there is no GPU here" in printed
        assert f"| {name} | CANNOT |" in page
    assert "0 PASS, 0 FAIL, 6 CANNOT" in page
    assert certify.FAILED == []


def test_a_step_that_breaks_fails_and_costs_no_other(certify, tmp_path, monkeypatch, capsys):
    def broken(here):
        """A step."""
        raise RuntimeError("CUDA error: illegal address\nand more")

    def fine(here):
        """Another."""
        return certify.Outcome(True, "well")

    monkeypatch.setattr(certify, "STEPS", {"broken": broken, "fine": fine})
    page = go(certify, tmp_path, "--cpu")
    assert "FAIL   broken: RuntimeError: CUDA error: illegal address [" in capsys.readouterr().out
    assert "| fine | PASS | Another. | well |" in page
    assert "1 PASS, 1 FAIL, 0 CANNOT" in page
    assert certify.FAILED == ["broken"]


def test_gradients_are_held_against_their_limits(certify, tmp_path, monkeypatch):
    here = certify.Here(torch.device("cpu"), tmp_path)
    assert certify.gradients(here).passed
    honest = certify.prepare

    def off(energy, x, precision, engine="auto"):
        gradient = honest(energy, x, precision, engine)
        return lambda x: gradient(x) * (1.0 + 1e-4)

    monkeypatch.setattr(certify, "prepare", off)
    assert not certify.gradients(here).passed


def test_the_shell_script_starts_it(tmp_path):
    words = [ROOT / "benchmarks" / "gpu_certify.sh", "--only", "warp"]
    there = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, env=there, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "unknown step 'warp'; choose among checks, tests, gradients" in done.stderr
