"""Purifiers of networks, by their folders on the command line."""

from __future__ import annotations

import pytest
import torch

from ebm_defense.generators.networks import (
    ConvGenerator,
    ConvSettings,
    LatentEnergy,
    LatentEnergySettings,
)
from ebm_defense.purifiers import LatentPurifier
from ebm_defense.storage.folders import DEFENSE, save_purifier
from ebm_defense.storage.weights import load_purifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A purifier of 8 × 8 pixels alone, without an encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = ConvGenerator(ConvSettings(latent=3, image_size=8, width=2))
        energy = LatentEnergy(LatentEnergySettings(size=3))
    purifier = LatentPurifier(energy, generator, steps=2)
    return save_purifier(purifier, tmp_path_factory.mktemp("latent") / "purifier", data="digits")


SMALL = ("--data", "digits", "--images", 2, "--steps", 1, "--replicates", 1)


def test_a_folder_of_a_purifier_alone_is_evaluated(run, tiny_defense, folder, tmp_path):
    command = ("evaluate", "--defense", tiny_defense, *SMALL, "--judge-replicates", 16)
    for spec in (folder, f"latent:{folder}"):
        out = tmp_path / str(spec)[:6].strip("/")
        status, printed, err = run(*command, "--purifier", spec, "--out", out)
        assert status == 0, err
        assert "posterior of a latent energy prior, 2 Langevin steps" in printed
        assert "full" in printed
    assert load_purifier(folder, steps=7).chain_steps == 7


def test_other_folders_are_refused_in_a_sentence(run, tiny_defense, folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    said = (folder / DEFENSE).read_text().replace("ConvGenerator", "Mirror")
    (broken / DEFENSE).write_text(said)
    wrong = {
        f"hat:{folder}": "holds a purifier latent, not hat",
        f"latent:{tmp_path / 'nowhere'}": "there is no defense",
        f"latent:{tiny_defense}": "holds a purifier langevin",
        f"latent:{broken}": "generator: unknown kind 'Mirror'; choose one of ConvEnergy",
        "hat": "hat:FOLDER",
    }
    for spec, reason in wrong.items():
        status, _, err = run("evaluate", "--defense", tiny_defense, *SMALL, "--purifier", spec)
        assert status == 2
        assert reason in err
        assert len(err.splitlines()) == 1


def test_it_is_no_defense_by_itself(run, folder):
    status, _, err = run("evaluate", "--defense", folder, *SMALL)
    assert status == 2
    assert "holds a purifier alone" in err


def test_a_file_that_is_not_the_one_saved_is_refused(folder):
    file = folder / "generator.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"!")
    try:
        with pytest.raises(Exception, match="SHA-256 differs"):
            load_purifier(folder)
    finally:
        file.write_bytes(whole)
