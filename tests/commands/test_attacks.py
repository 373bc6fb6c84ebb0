"""The catalogue on the command line: `attacks`, `evaluate --attack`, AdvGAN and corruptions."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ebm_defense.attacks.catalogue import ATTACKS, FAMILIES

SMALL = ("--data", "digits", "--images", 6, "--replicates", 2, "--judge-replicates", 3)


def small(defense: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("evaluate", "--defense", defense, *SMALL, "--out", out, *more)


def test_attacks_lists_every_name_with_its_cost(run, tiny_defense) -> None:
    status, printed, _ = run("attacks", "--defense", tiny_defense)
    assert status == 0
    names = {line.split()[0] for line in printed.splitlines() if line}
    assert names >= {*ATTACKS, *(f"{family}:NAME" for family in FAMILIES)}
    assert names >= {"foolbox:L2DeepFoolAttack", "torchattacks:Square", "art:DeepFool"}
    (bpda,) = (line for line in printed.splitlines() if line.startswith("bpda"))
    assert f"{(50 + 1) * 15 * 3:,}" in bpda
    costs = {line.split()[0]: line for line in printed.splitlines() if line}
    assert f" {(10 + 1) * 15 * 3:,} " in costs["torchattacks:PGD"]
    assert f" ≥ {15 * 3:,} " in costs["foolbox:L2DeepFoolAttack"]
    assert "Hill et al. 2021" in bpda
    short = run("attacks", "--defense", tiny_defense, "--no-libraries")[1]
    assert "foolbox:L2DeepFoolAttack" not in short
    assert run("attacks", "--defense", "nowhere")[0] == 2


def test_attacks_are_chosen_by_name_once_or_several_times(run, tiny_defense, tmp_path) -> None:
    words = (
        *("--attack", "transfer(steps=1)", "--attack", "torchattacks:FGSM", "--attack"),
        *("pgd(steps=1)", "--loss", "ce(average='softmax')", "--gradient", "bpda"),
    )
    out = tmp_path / "run"
    status, printed, err = run(*small(tiny_defense, out, *words))
    assert status == 0, err
    for word in ("quick-custom", "transfer PGD-CE(softmax)-1", "torchattacks FGSM", "(BPDA+EOT)"):
        assert word in printed
    assert 'average = "softmax"' in (out / "settings.toml").read_text()
    assert len(pd.read_csv(out / "records.csv")) == 6


def test_transfer_from_another_defense(run, tiny_defense, tmp_path) -> None:
    out = tmp_path / "run"
    words = ("--transfer-from", tiny_defense, "--steps", 1)
    status, printed, err = run(*small(tiny_defense, out, *words))
    assert status == 0, err
    assert f"transfer PGD-1 from {tiny_defense}" in printed
    (attack,) = tomllib.loads((out / "settings.toml").read_text())["protocol"]["attacks"]
    assert attack["source"]["purifier"]["settings"]["steps"] == 3
    assert len(attack["source"]["weights"]) == 64
    assert run(*small(tiny_defense, out, *words))[0] == 0


def test_a_settings_file_holds_attacks(run, tiny_defense, tmp_path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('attack = ["pgd(steps=1)", "torchattacks:VANILA"]\n')
    out = tmp_path / "run"
    status, printed, err = run(*small(tiny_defense, out, "--config", file))
    assert status == 0, err
    assert "PGD-1" in printed
    assert "torchattacks VANILA" in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attack", "pdg"), "unknown attack 'pdg'; choose one of"),
        (("--attack", "foolbox:L2DeepFoolAttack"), "moves in L2, not in Linf"),
        (("--attack", "foolbox:LinfPDG"), "near it are LinfPGD"),
        (("--attack", "pgd(stepz=1)"), "takes no 'stepz'"),
        (("--attack", "bpda", "--gradient", "bpda"), "no attack here takes a gradient"),
        (
            ("--attack", "art:DeepFool", "--norm", "L2", "--eps", 1, "--steps", 3),
            "takes a steps",
        ),
        (("--gradient", "magic"), "unknown gradient 'magic'"),
        (("--loss", "magic"), "unknown loss 'magic'"),
        (("--attack", "advgan:nowhere"), "train-advgan"),
        (("--transfer-from", "nowhere"), "no defense 'nowhere'"),
    ],
)
def test_mistakes_are_named_and_exit_with_2(run, tiny_defense, tmp_path, words, said) -> None:
    status, _, err = run(*small(tiny_defense, tmp_path / "run", *words))
    assert status == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


ADVGAN = ("train-advgan", "--data", "digits", "--images", 40, "--batch", 8, "--width", 4)


def test_advgan_is_trained_resumed_and_judged(run, tiny_defense, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = (*ADVGAN, "--defense", tiny_defense, "--checkpoint-every", 2)
    assert run(*words, "--updates", 3, "--out", whole)[0] == 0
    assert run(*words, "--updates", 2, "--out", parts)[0] == 0
    status, _, err = run(*words, "--updates", 3, "--out", parts)
    assert status == 2
    assert "--resume" in err
    assert run(*words, "--updates", 3, "--out", parts, "--resume")[0] == 0
    for file in ("generator.safetensors", "history.csv", "advgan.toml"):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    out = tmp_path / "run"
    status, printed, err = run(*small(tiny_defense, out, "--attack", f"advgan:{whole}"))
    assert status == 0, err
    assert "AdvGAN: Linf 0.1" in printed


def test_advgan_against_the_bare_classifier_in_l2(run, tiny_defense, tmp_path) -> None:
    threat = ("--norm", "L2", "--eps", 1.0)
    words = (*ADVGAN, "--defense", tiny_defense, "--against", "classifier", *threat)
    assert run(*words, "--updates", 1, "--out", tmp_path / "gan")[0] == 0
    status, _, err = run(*words, "--gradient", "magic", "--out", tmp_path / "other")
    assert status == 2
    assert "unknown gradient" in err
    assert run(*words, "--checkpoint-every", 0, "--out", tmp_path / "other")[0] == 2


def test_corruptions_print_a_table_and_go_on(run, tiny_defense, tmp_path) -> None:
    words = (
        *("corruptions", "--defense", tiny_defense, "--data", "digits", "--images", 5),
        *("--replicates", 2, "--out", tmp_path / "run"),
    )
    few = ("--corruption", "fog", "--corruption", "snow", "--severity", 2, "--severity", 4)
    status, printed, err = run(*words, *few)
    assert status == 0, err
    for word in (
        "| clean",
        "| fog",
        "| snow",
        "| mean",
        "defended 95% interval",
        "severities 2, 4",
    ):
        assert word in printed
    before = (tmp_path / "run" / "records.csv").read_bytes()
    assert len(pd.read_csv(tmp_path / "run" / "cells.csv")) == 1 + 4
    assert run(*words, *few)[0] == 0
    assert (tmp_path / "run" / "records.csv").read_bytes() == before
    status, _, err = run(*words)
    assert status == 2
    assert "corruptions" in err
    assert run(*words, "--corruption", "fogg")[0] == 2


def test_corruptions_are_read_from_files(run, tiny_defense, tmp_path) -> None:
    folder = tmp_path / "digits-c"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "haze.npy", rng.integers(0, 256, (50, 8, 8), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
    words = ("corruptions", "--defense", tiny_defense, "--folder", folder, "--replicates", 1)
    status, printed, err = run(*words, "--images", 6, "--out", tmp_path / "run")
    assert status == 0, err
    assert "| haze" in printed
    assert "| clean" not in printed
    assert "read from digits-c" in printed
    status, _, err = run(*words, "--corruption", "fog", "--out", tmp_path / "other")
    assert status == 2
    assert "holds no fog.npy; it holds haze" in err
