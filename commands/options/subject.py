"""An energy named on the command line, and how it is run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import nn

from ebm_defense.commands.main import from_file
from ebm_defense.commands.training.train_ebm import TrainEbm
from ebm_defense.langevin import LangevinSettings
from ebm_defense.storage.folders import RECIPE, learned_folder
from ebm_defense.storage.weights import load_energy, load_purifier

PERSISTENT, BURN_IN, LIKELIHOOD = "persistent", "burn-in", "likelihood"
SETTINGS, HISTORY = "settings.toml", "history.csv"


class Subject(NamedTuple):
    """An energy, and how it is run.

    Attributes:
        energy: the network.
        langevin: step size and temperature of its chains, and whether they are adjusted.
        learned_steps: how long a chain lives in learning, or the purifier's own length.
        data_noise: on training images, in [-1, 1] units.
        history: d_s and r_s of learning, if they were kept.
    """

    energy: nn.Module
    langevin: LangevinSettings
    learned_steps: int
    data_noise: float
    history: pd.DataFrame | None


def subject_of(name: str) -> Subject:
    """Load an energy by a shipped name, a defense folder, or the folder that train-ebm wrote.

    Raises:
        UsageError: there is no such energy.
    """
    folder = learned_folder(name)
    return _defended(name) if folder is None else _trained(folder)


def _trained(folder: Path) -> Subject:
    """Read an energy alone, and how it was learned."""
    said = next((f for n in (SETTINGS, RECIPE) if (f := folder / n).is_file()), folder / SETTINGS)
    s: TrainEbm = from_file(TrainEbm, str(said))
    settings = LangevinSettings(
        step_size=s.step_size, temperature=s.temperature, adjusted=s.adjusted
    )
    energy = load_energy(folder)
    history = folder / HISTORY
    curves = pd.read_csv(history) if history.is_file() else None
    return Subject(energy, settings, lived(s), s.data_noise, curves)


def lived(s: TrainEbm) -> int:
    """Return how long a chain lived in learning: of one that was never renewed, all its visits."""
    if s.start == BURN_IN:
        return 2 * s.langevin_steps * s.burn_in_visits
    if s.start != PERSISTENT or s.objective != LIKELIHOOD:
        return s.langevin_steps  # from the batch's own images, or none at all
    visits = max(s.updates * s.batch / s.bank, 1.0)
    return round(s.langevin_steps * min(1.0 / max(s.rejuvenation, 1e-9), visits))


def _defended(name: str) -> Subject:
    energy, purifier = load_energy(name), load_purifier(name)
    settings = LangevinSettings(**purifier.numbers)  # type: ignore[arg-type]
    return Subject(energy, settings, settings.steps, 2 * settings.step_size, None)
