"""`sample` draws, reconstructs, interpolates and measures, and says in whose features."""

from __future__ import annotations

import tomllib
from pathlib import Path

from safetensors.torch import load_file

SMALL = ("--data", "digits", "--count", 20, "--steps", 3, "--device", "cpu")


def test_everything_is_drawn_and_measured(run, tiny_defense, tmp_path: Path) -> None:
    words = ("sample", tiny_defense, *SMALL, "--out", tmp_path, "--reconstruct", 3)
    more = ("--updates", 2, "--interpolate", 2, "--between", 4)
    measured = ("--distance", "classifier", "--classifier", tiny_defense)
    status, printed, _ = run(*words, *more, *measured)
    assert status == 0
    for name in ("samples", "reconstructions", "interpolations"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert load_file(tmp_path / "samples.safetensors")["images"].shape == (20, 1, 8, 8)
    found = tomllib.loads((tmp_path / "sample.toml").read_text())
    assert found["steps"] == 3
    assert found["reconstruction"]["images"] == 3
    name = f"Fréchet distance in the features of {tiny_defense}'s classifier"
    assert found["distance"]["name"] == name
    assert f"{name}, 20 samples, 20 test images: " in printed
    assert "FID" not in printed


def test_steps_are_those_that_chains_live_if_not_given(run, tiny_defense, tmp_path: Path) -> None:
    words = ("sample", tiny_defense, "--count", 2, "--device", "cpu", "--out", tmp_path)
    status, printed, _ = run(*words)
    assert status == 0
    assert "2 images by 3 Langevin steps" in printed
    assert not (tmp_path / "interpolations.png").exists()


def test_mistakes_are_named(run, tiny_defense, tmp_path: Path) -> None:
    words = ("sample", tiny_defense, "--out", tmp_path)
    assert "count must be 1 or more" in run(*words, "--count", 0)[2]
    assert "has no energy" in run("sample", "fashion-mnist-gaussian", "--out", tmp_path)[2]
