"""Long-run MCMC purification with energy-based models, and the honest measure of it."""

from ebm_defense.classifiers import normalized
from ebm_defense.data import load_data
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies import ConvEnergy, ConvEnergySettings, QuadraticEnergy
from ebm_defense.errors import UsageError
from ebm_defense.purifiers import LangevinPurifier, Purifier
from ebm_defense.weights import load_defense, load_energy, load_purifier

__version__ = "0.1.0"

__all__ = [
    "ConvEnergy",
    "ConvEnergySettings",
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
]
