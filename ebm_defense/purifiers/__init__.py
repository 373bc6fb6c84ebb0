"""Purifiers: images in [0, 1] to images that are about in [0, 1], not clamped."""

from ebm_defense.purifiers.attributes import AttributePurifier
from ebm_defense.purifiers.base import Purifier, SteppedPurifier
from ebm_defense.purifiers.baselines import (
    BitDepth,
    GaussianNoise,
    Jpeg,
    MedianFilter,
    NoPurifier,
    TotalVariation,
)
from ebm_defense.purifiers.diffusion import DiffusionPurifier, LikelihoodPurifier
from ebm_defense.purifiers.gebm import GEBMPurifier
from ebm_defense.purifiers.hat import HatPurifier
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.purifiers.latent import LatentPurifier
from ebm_defense.purifiers.pair import PairPurifier

__all__ = [
    "AttributePurifier",
    "BitDepth",
    "DiffusionPurifier",
    "GEBMPurifier",
    "GaussianNoise",
    "HatPurifier",
    "Jpeg",
    "LangevinPurifier",
    "LatentPurifier",
    "LikelihoodPurifier",
    "MedianFilter",
    "NoPurifier",
    "PairPurifier",
    "Purifier",
    "SteppedPurifier",
    "TotalVariation",
]
