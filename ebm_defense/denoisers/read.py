"""Denoisers from wherever people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebm_defense.denoisers.base import Denoiser
from ebm_defense.denoisers.diffusers_layout import CONFIG, is_diffusers, read_diffusers
from ebm_defense.errors import UsageError


def open_denoiser(place: str | Path, **settings: Any) -> Denoiser:
    """Open a diffusion model.

    Args:
        place: a folder of diffusers (`train-diffusion` writes one).
        **settings: what the files do not tell.

    Raises:
        UsageError: nothing there that is known, or files that are damaged or do not fit.
    """
    path = Path(place).expanduser()
    if settings:
        raise UsageError(f"{place} tells all of itself; leave {', '.join(settings)} out.")
    if not is_diffusers(path):
        raise UsageError(f"{place} is no diffusion model: no folder with a {CONFIG} of diffusers.")
    return read_diffusers(path).requires_grad_(False)
