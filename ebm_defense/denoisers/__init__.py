"""Networks that estimate the noise in an image: diffusion and score models."""

from ebm_defense.denoisers.base import Denoiser

__all__ = ["Denoiser"]
