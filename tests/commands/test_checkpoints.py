"""Defenses are exported, copied and published."""

from __future__ import annotations

from pathlib import Path

import torch

from ebm_defense import load_energy
from ebm_defense.storage.folders import find_folder, verify


def test_export_writes_every_network(run, tmp_path: Path) -> None:
    status, printed, _ = run("checkpoints", "export", "fashion-mnist-longrun", "--out", tmp_path)
    assert status == 0
    assert (tmp_path / "ebm.pth").is_file()
    assert "it is soft_lrelu" in printed or "it is leaky_relu" in printed


def test_publish_to_a_folder_copies_a_verified_defense(run, tmp_path: Path) -> None:
    publish = ("checkpoints", "publish", "fashion-mnist")
    assert run(*publish, tmp_path / "mine")[0] == 0
    verify(tmp_path / "mine")
    there, here = load_energy(tmp_path / "mine"), load_energy("fashion-mnist")
    assert all(map(torch.equal, there.state_dict().values(), here.state_dict().values()))
    assert "is not empty" in run(*publish, tmp_path / "mine")[2]
    itself = find_folder("fashion-mnist")
    assert "is the defense itself" in run(*publish, itself)[2]
    assert "publish needs where to" in run(*publish)[2]
