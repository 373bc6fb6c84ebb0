"""`ebm-defense train-defense` from options to a defense that `evaluate` takes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebm_defense import data as data_module
from ebm_defense import load_defense
from ebm_defense.data import DATASETS, Images
from ebm_defense.data.sampling import in_memory
from ebm_defense.purifiers import LangevinPurifier
from ebm_defense.purifiers.baselines import NoPurifier
from ebm_defense.storage.files import load_tensors
from ebm_defense.storage.folders import read_settings, shipped, shipped_folder

SHORT = (
    "--updates", 2, "--batch", 4, "--images", 40, "--validation-images", 10, "--validate-every", 1,
    "--validation-steps", 1, "--validation-draws", 1, "--attack-steps", 1, "--precision", "fp32",
)  # fmt: skip
DIGITS = ("--data", "digits", *SHORT)


def recipe_of(name: str) -> Path:
    """Return where a shipped defense has its recipe, if it has one."""
    return shipped_folder() / name / "recipe.toml"


def natural(run, tmp_path) -> Path:
    status, _, _ = run(
        "train-defense", *DIGITS, "--learn", "classifier", "--purifier", "none", "--eps", 0,
        "--classifier", "conv", "--out", tmp_path / "natural",
    )  # fmt: skip
    assert status == 0
    return tmp_path / "natural" / "defense"


def test_every_row_comes_from_the_one_command(run, tmp_path):
    bare = natural(run, tmp_path)
    assert isinstance(load_defense(bare).purifier, NoPurifier)
    status, _, _ = run(
        "train-defense", *DIGITS, "--classifier", bare, "--classifier", bare, "--width", 2,
        "--out", tmp_path / "front",
    )  # fmt: skip
    assert status == 0
    front = tmp_path / "front" / "defense"
    defense = load_defense(front)
    assert isinstance(defense.purifier, LangevinPurifier)
    assert "λ = 0" in read_settings(front).description
    weights = [load_tensors(f / "classifier.safetensors") for f in (bare, front)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    both = ("--learn", "both", "--init", front, "--classifier", front, "--loss", "trades")
    status, _, _ = run("train-defense", *DIGITS, *both, "--out", tmp_path / "both")
    assert status == 0
    noise = ("--learn", "classifier", "--purifier", "gaussian:0.1", "--classifier", "resnet")
    status, _, _ = run("train-defense", *DIGITS, *noise, "--out", tmp_path / "noise")
    assert status == 0
    assert read_settings(tmp_path / "noise" / "defense").purifier.numbers == {"std": 0.1}


def test_a_run_says_its_settings_which_run_it_again(run, tmp_path):
    bare = natural(run, tmp_path)
    first = tmp_path / "natural"
    status, _, _ = run(
        "train-defense", "--config", first / "settings.toml", "--out", tmp_path / "again"
    )
    assert status == 0
    again = load_tensors(tmp_path / "again" / "defense" / "classifier.safetensors")
    expected = load_tensors(bare / "classifier.safetensors")
    assert all(torch.equal(again[k], expected[k]) for k in expected)
    status, _, err = run("train-defense", "--config", first / "settings.toml")
    assert status == 2
    assert "--resume" in err


def test_what_cannot_be_learned_is_said_before_any_work(run, tmp_path):
    for words, said in (
        ((), "name a classifier"),
        (("--classifier", "nobody"), "there is no defense"),
        (("--classifier", "conv", "--learn", "all"), "choose one of energy"),
        (("--classifier", "conv", "--activation", "sine"), "choose one of"),
    ):
        status, _, err = run("train-defense", *DIGITS, *words, "--out", tmp_path / "x")
        assert status == 2
        assert said in err


@pytest.mark.parametrize("name", [s.name for s in shipped() if recipe_of(s.name).exists()])
def test_every_shipped_recipe_starts(run, tmp_path, monkeypatch, name):
    """From the options that lie beside the weights, cut down to two updates on random images."""
    images = torch.rand(60, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    source = in_memory(Images(images, torch.arange(60) % 10))
    random = dataclasses.replace(DATASETS["fashion-mnist"], open=lambda root, split, folder: source)
    monkeypatch.setitem(data_module.DATASETS, "fashion-mnist", random)
    monkeypatch.chdir(tmp_path)
    bare = ("--learn", "classifier", "--purifier", "none", "--eps", 0)
    asked = recipe_of(name).read_text(encoding="utf-8")
    for network in re.findall(r"natural-(\w+)/defense", asked):
        words = (*SHORT, *bare, "--classifier", network, "--out", f"natural-{network}")
        assert run("train-defense", *words)[0] == 0
    words = ("--config", recipe_of(name), *SHORT, "--no-compiled", "--out", "made")
    status, _, err = run("train-defense", *words)
    assert status == 0, err
    made, shipped_one = (read_settings(f) for f in (Path("made/defense"), recipe_of(name).parent))
    assert made.classifier == shipped_one.classifier
    assert made.purifier.networks == shipped_one.purifier.networks
    assert made.purifier.name == shipped_one.purifier.name
    if "steps" in made.purifier.numbers:
        assert made.purifier.numbers["steps"] == shipped_one.purifier.numbers["steps"]


def test_the_recipe_for_cifar10_runs_end_to_end_on_200_random_images(run, tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(200, 3, 32, 32, generator=generator)
    source = in_memory(Images(images, torch.arange(200) % 10))
    random = dataclasses.replace(DATASETS["cifar10"], open=lambda root, split, folder: source)
    monkeypatch.setitem(data_module.DATASETS, "cifar10", random)
    made = ("--data", "cifar10", *SHORT, "--learn", "both", "--classifier", "conv", "--width", 2)
    status, out, _ = run("train-defense", *made, "--dry-run", "--out", tmp_path / "dry")
    assert status == 0
    assert "hours" in out
    status, _, _ = run("train-defense", *made, "--likelihood", 0.01, "--out", tmp_path / "tiny")
    assert status == 0
    monkeypatch.chdir(tmp_path / "tiny")
    augment = ("--augment", "defense", "--augment-images", 8, "--agreement", 0)
    status, _, _ = run("train-defense", *made, *augment, "--out", tmp_path / "more")
    assert status == 0
    status, out, _ = run(
        "evaluate", "--defense", tmp_path / "more" / "defense", "--data", "cifar10", "--images", 2,
        "--steps", 1, "--replicates", 1, "--judge-replicates", 16, "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0


def test_torchruns_processes_learn_the_weights_of_one(run, tmp_path):
    """Without noise the mean of both halves' gradients is the whole batch's."""
    alone = load_tensors(natural(run, tmp_path) / "classifier.safetensors")
    words = (
        *DIGITS, "--learn", "classifier", "--purifier", "none", "--eps", 0, "--classifier", "conv",
        "--out", tmp_path / "two",
    )  # fmt: skip
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    command = [*torchrun, "ebm_defense.commands.main", "train-defense", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    together = load_tensors(tmp_path / "two" / "defense" / "classifier.safetensors")
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-5)
