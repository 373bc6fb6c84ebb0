"""Energies U(x): anything that maps `[N, C, H, W]` in [-1, 1] to `[N]`."""

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, SoftLeakyReLU
from ebm_defense.energies.quadratic import QuadraticEnergy

__all__ = ["ConvEnergy", "ConvEnergySettings", "QuadraticEnergy", "SoftLeakyReLU"]
