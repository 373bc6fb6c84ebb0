"""Long-run MCMC purification with energy-based models, and the honest measure of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm_defense.classifiers import normalized
    from ebm_defense.data import FolderSettings, load_data
    from ebm_defense.defense import PurifiedClassifier
    from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
    from ebm_defense.energies.quadratic import QuadraticEnergy
    from ebm_defense.errors import UsageError
    from ebm_defense.interface.preprocessing import preprocessing_of
    from ebm_defense.protect import protect
    from ebm_defense.purifiers.base import Purifier
    from ebm_defense.purifiers.langevin import LangevinPurifier
    from ebm_defense.storage.weights import load_defense, load_energy, load_purifier

__version__ = "0.1.0"

_HOME = {
    "ConvEnergy": "energies",
    "ConvEnergySettings": "energies",
    "FolderSettings": "data",
    "LangevinPurifier": "purifiers",
    "PurifiedClassifier": "defense",
    "Purifier": "purifiers",
    "QuadraticEnergy": "energies",
    "UsageError": "errors",
    "load_data": "data",
    "load_defense": "storage.weights",
    "load_energy": "storage.weights",
    "load_purifier": "storage.weights",
    "preprocessing_of": "interface.preprocessing",
    "protect": "protect",
    "normalized": "classifiers",
}
"""Which module each name comes from; it is imported when the name is first used."""

__all__ = [
    "ConvEnergy",
    "ConvEnergySettings",
    "FolderSettings",
    "LangevinPurifier",
    "PurifiedClassifier",
    "Purifier",
    "QuadraticEnergy",
    "UsageError",
    "load_data",
    "load_defense",
    "load_energy",
    "load_purifier",
    "normalized",
    "preprocessing_of",
    "protect",
]


def __getattr__(name: str) -> Any:
    # The command line prints its help without torch, which takes seconds to import.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
