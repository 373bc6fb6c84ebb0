"""Every denoiser that a defense folder may hold, by name."""

from __future__ import annotations

from ebm_defense.denoisers.song import SongDenoiser, SongSettings
from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.energies.registry import Network

DENOISERS: dict[str, Network] = {
    "UNetDenoiser": Network(UNetSettings, UNetDenoiser),
    "SongDenoiser": Network(SongSettings, SongDenoiser),
}
"""By the names of their classes."""
