"""Diffusion models from wherever people have them, in the layouts in which they are published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_defense.denoisers.base import Denoiser
from ebm_defense.denoisers.diffusers_layout import CONFIG, is_diffusers, read_diffusers
from ebm_defense.denoisers.guided import is_guided, read_guided
from ebm_defense.denoisers.song_layouts import is_edm, is_score_sde, read_edm, read_score_sde
from ebm_defense.errors import UsageError
from ebm_defense.storage import hub
from ebm_defense.storage.files import load_plain, load_tensors

FILES = (".pt", ".pth", ".bin", ".safetensors")
HUB = ("*config.json", "*.safetensors", "*.bin", "*.pt", "*.pth")
"""What of a repository on the Hub may be a diffusion model."""
DEEP = 2


def open_denoiser(place: str | Path, **settings: Any) -> Denoiser:
    """Open a diffusion model, its weights fixed.

    Args:
        place: a folder of diffusers (`train-diffusion` writes one) or hf://owner/name[@revision]; a
            file of guided-diffusion, score_sde or of EDM's networks, or a folder with one.
        **settings: what files do not tell: `image_size` of guided-diffusion's and score_sde's,
            `head_channels` of guided-diffusion's, `preconditioning` of EDM's ("edm" or "vp").

    Raises:
        UsageError: nothing there that is known, or files that are damaged or do not fit.
    """
    path = hub.download(str(place), HUB) if hub.is_address(place) else Path(place).expanduser()
    if is_diffusers(path):
        if settings:
            raise UsageError(f"{place} tells all of itself; leave {', '.join(settings)} out.")
        return read_diffusers(path).requires_grad_(False)
    return _read(_file(path, str(place)), settings).requires_grad_(False)


def _file(path: Path, place: str) -> Path:
    """Return the one file of weights that a place stands for."""
    if path.suffix == ".pkl":
        raise UsageError(
            f"{place} carries code, which is not run here; save the network's state_dict with "
            "torch.save where it is trusted, and give that file."
        )
    found = [path] if path.is_file() else [p for p in sorted(path.glob("*")) if p.suffix in FILES]
    if len(found) != 1 or found[0].suffix not in FILES:
        several = f"holds several files ({', '.join(p.name for p in found)}); name one"
        none = f"is no diffusion model: neither a folder with a {CONFIG} nor a file of weights"
        raise UsageError(f"{place} {several if len(found) > 1 else none}.")
    return found[0]


def _read(path: Path, settings: dict[str, Any]) -> Denoiser:
    """Read a file of weights by the layout that its keys show."""
    content = load_tensors(path) if path.suffix == ".safetensors" else load_plain(path)
    try:
        if is_score_sde(content):
            return read_score_sde(content, str(path), **settings)
        for state in _states(content):
            if is_guided(state):
                return read_guided(state, str(path), **settings)
            if is_edm(state):
                return read_edm(state, str(path), **settings)
    except TypeError as error:  # a setting that this layout has not
        raise UsageError(f"{path}: {error}.") from error
    raise UsageError(
        f"{path} holds weights of no layout that is known: diffusers with its {CONFIG}, "
        "guided-diffusion, score_sde or EDM."
    )


def _states(content: Any, depth: int = DEEP) -> list[Mapping[str, Tensor]]:
    """Return what may be a state_dict: what a file held, and what that holds by name."""
    if not isinstance(content, Mapping):
        return []
    inside = [s for v in content.values() if depth for s in _states(v, depth - 1)]
    return [content, *inside]
