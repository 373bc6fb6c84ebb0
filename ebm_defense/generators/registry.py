"""Every network of latent vectors that a defense folder may hold, by name."""

from __future__ import annotations

from ebm_defense.energies.registry import Network
from ebm_defense.generators.networks import (
    ConvEncoder,
    ConvGenerator,
    ConvSettings,
    DenseEncoder,
    DenseGenerator,
    DenseSettings,
    LatentClassifier,
    LatentClassifierSettings,
    LatentEnergy,
    LatentEnergySettings,
    PairEnergy,
    PairEnergySettings,
)

GENERATORS: dict[str, Network] = {
    "ConvGenerator": Network(ConvSettings, ConvGenerator),
    "ConvEncoder": Network(ConvSettings, ConvEncoder),
    "DenseGenerator": Network(DenseSettings, DenseGenerator),
    "DenseEncoder": Network(DenseSettings, DenseEncoder),
    "LatentEnergy": Network(LatentEnergySettings, LatentEnergy),
    "LatentClassifier": Network(LatentClassifierSettings, LatentClassifier),
    "PairEnergy": Network(PairEnergySettings, PairEnergy),
}
"""By the names of their classes."""
