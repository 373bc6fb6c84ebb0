from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ebm_defense import ConvEnergy, ConvEnergySettings, LangevinPurifier, PurifiedClassifier
from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.commands.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; return its exit status and what it printed."""

    def go(*words: object) -> tuple[int, str, str]:
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return go


@pytest.fixture(scope="session")
def tiny_defense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained defense of 8×8 images, the size of data set `digits`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = WideResNet(WideResNetSettings(channels=1, depth=10, widen=1))
        energy = ConvEnergy(ConvEnergySettings(channels=1, image_size=8, width=2))
    purifier = LangevinPurifier(energy, 3, 0.03, 9e-4)
    defense = PurifiedClassifier(normalized(network, 0.5, 0.5), purifier, replicates=2)
    return defense.save(tmp_path_factory.mktemp("tiny") / "defense")
