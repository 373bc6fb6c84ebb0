"""`ebm-defense train-latent`."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from ebm_defense.purifiers.attributes import AttributePurifier
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.storage.weights import load_purifier

SMALL = (
    *("train-latent", "--data", "digits", "--images", 30, "--latent", 3, "--width", 2),
    *("--hidden", 8, "--energy-width", 2, "--batch", 6, "--prior-steps", 2),
    *("--posterior-steps", 2, "--image-steps", 2),
)


def test_a_purifier_is_learned_step_by_step_and_resumed_exactly(run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*SMALL, "--updates", 4, "--out", whole)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebm_defense.commands.training.train_latent.keep", stop_after(2))
        assert run(*SMALL, "--updates", 4, "--checkpoint-every", 2, "--out", parts)[0] == 130
    resume = ("--config", parts / "settings.toml", "--resume", "--checkpoint-every", 250)
    assert run("train-latent", *resume)[0] == 0
    for network in ("generator", "encoder", "energy"):
        file = f"purifier/{network}.safetensors"
        one, other = (load_file(folder / file) for folder in (whole, parts))
        assert all((one[k] == other[k]).all() for k in one)
    assert (whole / "history.csv").read_bytes() == (parts / "history.csv").read_bytes()
    pictures = {p.name for p in (whole / "pictures").iterdir()}
    assert pictures == {"samples-000004.png", "purified-000004.png"}
    # What was learned is given to recipes that learn an energy alone.
    kinds = {
        "hat": HatPurifier,
        "gebm": GEBMPurifier,
        "nce": LatentPurifier,
        "attributes": AttributePurifier,
    }
    for recipe, kind in kinds.items():
        out, given = tmp_path / recipe, whole / "purifier"
        more = ("--recipe", recipe, "--init", given, "--updates", 2, "--out", out, "--stages", 2)
        more = (*more, "--attribute", "1,7") if recipe == "attributes" else more
        status, _, err = run(*SMALL, *more)
        assert status == 0, err
        purifier = load_purifier(out / "purifier")
        assert type(purifier) is kind
        mine, theirs = (f / "generator.safetensors" for f in (out / "purifier", given))
        assert mine.read_bytes() == theirs.read_bytes()


def stop_after(updates: int):
    from ebm_defense.commands.training.train_latent import keep

    def keep_and_stop(trainer, *rest) -> None:
        keep(trainer, *rest)
        if trainer.done == updates:
            raise KeyboardInterrupt

    return keep_and_stop


def test_dense_networks_of_two_layers_learn_too(run, tmp_path: Path) -> None:
    layers = ("--network", "dense", "--upper", 2, "--updates", 1, "--out", tmp_path)
    assert run(*SMALL, *layers)[0] == 0
    purifier = load_purifier(tmp_path / "purifier")
    assert purifier.energy.settings.size == 5


ATTRIBUTES = (
    *("--recipe", "attributes", "--init", "fashion-mnist"),
    "--attribute",
)


def test_mistakes_are_told_before_any_work(run, tmp_path: Path) -> None:
    wrong = {
        ("--recipe", "gan"): "recipe is 'gan'",
        ("--recipe", "hat"): "give --init FOLDER",
        ("--recipe", "gebm", "--init", "fashion-mnist"): "has no encoder and no generator",
        ("--network", "unet"): "network is 'unet'",
        ("--latent", 0): "sizes must be at least 1",
        (*ATTRIBUTES, "7,twelve"): "must name classes from 0 to 9",
    }
    for options, said in wrong.items():
        status, _, err = run(*SMALL, *options, "--out", tmp_path / "out")
        assert status == 2
        assert said in err
        assert len(err.splitlines()) == 1
