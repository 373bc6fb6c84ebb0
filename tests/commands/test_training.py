"""The commands that make a defense, one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebm_defense import load_energy, load_purifier
from ebm_defense.energies.registry import ENERGIES as NETWORKS
from ebm_defense.storage.files import save_tensors
from ebm_defense.storage.folders import read_settings
from ebm_defense.storage.weights import network_of

ENERGY = (
    *("train-ebm", "--data", "digits", "--images", 60, "--width", 2, "--bank", 30, "--batch", 10),
    *("--langevin-steps", 2, "--checkpoint-every", 2, "--pictures-every", 4),
    *("--chain-lengths", 1, 3),
)
CLASSIFIER = (
    *("train-classifier", "--data", "digits", "--images", 100, "--widen", 1, "--batch", 20),
)
SHAPE = ("--image-size", 8, "--steps", 3, "--data", "digits")


def test_train_ebm_resumes_exactly_and_draws(run, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*ENERGY, "--updates", 4, "--out", whole)[0] == 0
    # The learning rate's cosine knows the end, so the interrupted run has the same end.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebm_defense.commands.training.train_ebm.TrainEbm._draw", stop_after(2))
        assert run(*ENERGY, "--updates", 4, "--out", parts, "--pictures-every", 2)[0] == 130
    resume = ("--config", parts / "settings.toml", "--resume", "--pictures-every", 4)
    assert run("train-ebm", *resume)[0] == 0
    one, other = (load_file(folder / "energy.safetensors") for folder in (whole, parts))
    assert all(np.array_equal(one[k].numpy(), other[k].numpy()) for k in one)
    assert (whole / "history.csv").read_bytes() == (parts / "history.csv").read_bytes()
    pictures = {p.name for p in (whole / "pictures").iterdir()}
    assert pictures == {"ends-0000004.png", "chains-0000004.png", "curves.png"}


def stop_after(updates: int):
    def draw(command, trainer, out) -> None:
        if trainer.done == updates:
            raise KeyboardInterrupt

    return draw


def test_long_run_learning_goes_by_generator_prior_and_burn_in(run, tmp_path: Path) -> None:
    """The three trainings of EBM Life Cycle, each of which takes what the one before wrote."""
    short, prior, long = (tmp_path / name for name in ("short", "prior", "long"))
    small = (*ENERGY, "--updates", 2, "--limit", "1e6")
    assert run(*small, "--fresh", "cooperative", "--rejuvenation", 1, "--out", short)[0] == 0
    generator = ("--fresh", "generator", "--generator", short / "generator.safetensors")
    assert run(*small, *generator, "--prior-spread", 0.15, "--out", prior)[0] == 0
    burn_in = ("--start", "burn-in", "--burn-in", 12, "--burn-in-visits", 2)
    status, printed, _ = run(
        *small, *generator, *burn_in, "--prior", prior / "energy.safetensors", "--out", long
    )
    assert status == 0
    assert "chains live 8 steps on average" in printed
    kept, beneath = (load_file(f / "energy.safetensors") for f in (long, prior))
    assert {k.split(".")[0] for k in kept} == {"energy", "prior"}
    assert all(np.array_equal(kept[f"prior.{k}"], v) for k, v in beneath.items())
    # U = E + E₀ + T·‖x‖²/(2τ²), the pull being the prior's own.
    x = np.zeros((1, 1, 8, 8), dtype=np.float32)
    u = network_of(long / "energy.safetensors", NETWORKS)
    assert u.settings.pull == 0
    assert u.prior.settings.pull == pytest.approx(0.0036 / 0.15**2)
    assert u(torch.from_numpy(x)).shape == (1,)
    status, _, error = run(*small, "--fresh", "generator", "--out", tmp_path / "never")
    assert status == 2
    assert "needs --generator FILE" in error


def test_learning_begins_at_an_energy_by_file_or_name(run, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*ENERGY, "--updates", 1, "--out", first)[0] == 0
    for init in (first / "energy.safetensors", first):
        out = tmp_path / f"second-{init.suffix}"
        begun = run(*ENERGY, "--updates", 1, "--init", init, "--adam-lr", 1e-12, "--average", 0,
                    "--out", out)  # fmt: skip
        assert begun[0] == 0
        one, other = (load_file(f / "energy.safetensors") for f in (first, out))
        assert all(np.allclose(one[k], other[k], atol=1e-6) for k in one)
    status, _, error = run(*ENERGY, "--init", "fashion-mnist-longrun", "--out", second)
    assert status == 2
    assert "was made for image_size 28, not 8" in error


def test_a_second_run_in_the_same_folder_needs_resume(run, tmp_path: Path) -> None:
    # The first may ask for it too: a run killed before its first checkpoint is repeated as it is.
    assert run(*ENERGY, "--updates", 1, "--out", tmp_path, "--resume")[0] == 0
    status, _, err = run(*ENERGY, "--updates", 1, "--out", tmp_path)
    assert status == 2
    assert "--resume" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", 7), ("--activation", "soft_lrelu"), ("--images", 50), ("--bank", 40)],
)
def test_what_resuming_cannot_change_is_refused(run, tmp_path: Path, option, value) -> None:
    first = (*ENERGY, "--updates", 2, "--out", tmp_path)
    assert run(*first)[0] == 0
    before = (tmp_path / "settings.toml").read_bytes()
    status, _, err = run(*first, "--resume", option, value)
    assert status == 2
    assert f"was begun with {option}" in err or f"was begun without {option}" in err
    assert (tmp_path / "settings.toml").read_bytes() == before
    # What takes effect may change, and the same value said again is none.
    assert run(*first, "--resume", "--updates", 3, "--adam-lr", 1e-5, "--seed", 0)[0] == 0


def test_a_classifier_goes_on_with_its_own_seed_and_purifier(run, tmp_path: Path) -> None:
    first = (*CLASSIFIER, "--epochs", 1, "--out", tmp_path)
    assert run(*first)[0] == 0
    for change in (("--seed", 3), ("--purified", "gaussian:0.2")):
        status, _, err = run(*first, "--resume", *change)
        assert status == 2
        assert f"cannot change it to {change[1]}" in err
    assert run(*first, "--resume", "--epochs", 2)[0] == 0


def test_divergence_stops_with_a_sentence_and_keeps_the_checkpoint(run, tmp_path: Path) -> None:
    assert run(*ENERGY, "--updates", 2, "--out", tmp_path)[0] == 0
    wild = ("--updates", 9, "--step-size", 90.0, "--resume", "--out", tmp_path)
    status, _, err = run(*ENERGY, *wild)
    assert status == 1
    assert "diverged" in err
    assert (tmp_path / "checkpoint.pt").exists()


def test_from_training_to_a_defense(run, tmp_path: Path) -> None:
    energy, plain, tuned = tmp_path / "energy", tmp_path / "plain", tmp_path / "tuned"
    assert run(*ENERGY, "--updates", 2, "--out", energy)[0] == 0
    assert run(*CLASSIFIER, "--epochs", 1, "--out", plain)[0] == 0
    parts = ("--energy", energy / "energy.safetensors", *SHAPE)
    first = ("assemble", "--classifier", plain / "classifier.safetensors", *parts)
    assert run(*first, "--out", tmp_path / "first")[0] == 0
    purified = ("--purified", tmp_path / "first", "--init", plain / "classifier.safetensors")
    assert run(*CLASSIFIER, *purified, "--epochs", 1, "--out", tuned)[0] == 0
    again = run(*CLASSIFIER, *purified, "--epochs", 2, "--out", tuned, "--resume")
    assert again[0] == 0
    assert (tuned / "purified").is_dir()
    second = (
        *("assemble", "--classifier", tuned / "classifier.safetensors", *parts),
        *("--undefended", plain / "classifier.safetensors", "--out", tmp_path / "second"),
    )
    assert run(*second)[0] == 0
    assert run("checkpoints", "verify", tmp_path / "second")[0] == 0


def test_train_classifier_on_a_baseline(run, tmp_path: Path) -> None:
    words = ("--purified", "gaussian:0.2", "--copies", 2, "--epochs", 2, "--out", tmp_path)
    assert run(*CLASSIFIER, *words)[0] == 0
    assert not (tmp_path / "purified").exists()


def test_assemble_takes_the_activation_that_the_energy_was_trained_with(run, tmp_path) -> None:
    smooth = ("--activation", "soft_lrelu", "--updates", 1)
    assert run(*ENERGY, *smooth, "--out", tmp_path / "e")[0] == 0
    assert run(*CLASSIFIER, "--epochs", 1, "--out", tmp_path / "c")[0] == 0
    weights = tmp_path / "e" / "energy.safetensors"
    words = ("assemble", "--classifier", tmp_path / "c" / "classifier.safetensors", "--steps", 2)
    assert run(*words, "--energy", weights, "--out", tmp_path / "d")[0] == 0
    energy = load_energy(tmp_path / "d").settings
    assert (energy.activation, energy.image_size) == ("soft_lrelu", 8)
    assert run(*words, "--energy", weights, "--adjusted", "--out", tmp_path / "a")[0] == 0
    assert load_purifier(tmp_path / "a").settings.adjusted
    assert not load_purifier(tmp_path / "a", adjusted=False).settings.adjusted
    assert read_settings(tmp_path / "d").data == "digits"
    wrong = run(*words, "--energy", weights, "--activation", "leaky_relu", "--out", tmp_path / "x")
    assert wrong[0] == 2
    assert "was trained with activation soft_lrelu" in wrong[2]
    save_tensors(tmp_path / "e" / "mute.safetensors", load_file(weights))
    mute = ("--energy", tmp_path / "e" / "mute.safetensors", "--out", tmp_path / "m")
    assert "give --image-size" in run(*words, *mute)[2]
    assert "give --activation" in run(*words, *mute, "--image-size", 8)[2]
    told = ("--image-size", 8, "--activation", "soft_lrelu")
    assert run(*words, *mute, *told)[0] == 0


def test_assemble_names_weights_of_another_kind(run, tmp_path: Path) -> None:
    assert run(*CLASSIFIER, "--epochs", 1, "--out", tmp_path / "plain")[0] == 0
    weights = tmp_path / "plain" / "classifier.safetensors"
    words = ("--classifier", weights, "--energy", weights, *SHAPE, "--out", tmp_path / "d")
    status, _, errors = run("assemble", *words)
    assert status == 2
    assert str(weights) in errors
    assert "WideResNet, not of an energy" in errors


def test_assemble_wants_one_purifier(run, tmp_path: Path) -> None:
    words = ("--classifier", tmp_path / "none.safetensors", "--out", tmp_path / "d")
    assert run("assemble", *words)[0] == 2


def test_checkpoints_lists_and_verifies_what_ships(run) -> None:
    status, listed, _ = run("checkpoints", "list")
    assert status == 0
    assert "fashion-mnist" in listed
    assert run("checkpoints", "verify")[0] == 0
    assert run("checkpoints", "verify", "fashion-mnist")[0] == 0
    assert run("checkpoints", "verify", "nowhere")[0] == 2
    assert run("checkpoints", "import", "something")[0] == 2
    assert run("checkpoints", "import", "ebm-defense-cifar10")[0] == 2
