"""Purifiers: images in [0, 1] to images that are about in [0, 1], not clamped."""

from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.baselines import (
    BitDepth,
    GaussianNoise,
    Jpeg,
    MedianFilter,
    NoPurifier,
    TotalVariation,
)
from ebm_defense.purifiers.langevin import LangevinPurifier

__all__ = [
    "BitDepth",
    "GaussianNoise",
    "Jpeg",
    "LangevinPurifier",
    "MedianFilter",
    "NoPurifier",
    "Purifier",
    "SteppedPurifier",
    "TotalVariation",
]
