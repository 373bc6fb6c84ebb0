"""Energies U(x): anything that maps `[N, C, H, W]` in [-1, 1] to `[N]`."""

from ebm_defense.energies.conv import (
    ConvEnergy,
    ConvEnergySettings,
    QuadraticEnergy,
    SoftLeakyReLU,
)

__all__ = ["ConvEnergy", "ConvEnergySettings", "QuadraticEnergy", "SoftLeakyReLU"]
