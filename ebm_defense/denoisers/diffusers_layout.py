"""Denoisers in diffusers' own layout: config.json, scheduler_config.json and the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.storage.files import load_tensors, save_tensors, writable_folder, write_text
from ebm_defense.storage.state_dicts import load_into

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
KIND = "UNet2DModel"
OLD_ATTENTION = {
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
}  # fmt: skip
"""Names of attention's matrices before diffusers 0.18, and since."""


def is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a model of diffusers, or a pipeline with one in `unet`."""
    return any((place / CONFIG).is_file() for place in (folder / "unet", folder))


def read_diffusers(folder: Path) -> UNetDenoiser:
    """Read a denoiser from a folder of diffusers: a model beside its scheduler, or a pipeline.

    Raises:
        UsageError: a file is missing or damaged, or the model is no unconditional UNet2DModel.
    """
    pipeline = (folder / "unet" / CONFIG).is_file()
    model = folder / "unet" if pipeline else folder
    scheduler = (folder / "scheduler" if pipeline else folder) / SCHEDULER
    config = _json(model / CONFIG)
    if config.get("_class_name", KIND) != KIND:
        raise UsageError(f"{model} holds a {config['_class_name']}; only a {KIND} purifies here.")
    if not scheduler.is_file():
        raise UsageError(f"{scheduler} is missing, which says how much noise each level has.")
    settings = UNetSettings.of(config, _json(scheduler), str(model))
    denoiser = UNetDenoiser(settings)
    weights = next((model / name for name in WEIGHTS if (model / name).is_file()), None)
    if weights is None:
        raise UsageError(f"{model} holds no weights; one of {', '.join(WEIGHTS)} must be there.")
    load_into(denoiser.unet, modern(load_tensors(weights)), str(weights))
    return denoiser


def write_diffusers(denoiser: UNetDenoiser, folder: Path) -> Path:
    """Write a denoiser as `UNet2DModel.from_pretrained` and `read_diffusers` read it.

    Raises:
        UsageError: the folder cannot be written.
    """
    settings, folder = denoiser.settings, writable_folder(folder)
    own = {} if settings.patch == 1 else {"patch": settings.patch}
    _write(folder / CONFIG, {"_class_name": KIND} | settings.config | own)
    _write(folder / SCHEDULER, {"_class_name": "DDPMScheduler"} | settings.scheduler)
    save_tensors(folder / WEIGHTS[0], denoiser.unet.state_dict())
    return folder


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under attention's names of today."""

    def renamed(key: str) -> str:
        head, _, kind = key.rpartition(".")
        before, _, name = head.rpartition(".")
        return f"{before}.{OLD_ATTENTION[name]}.{kind}" if name in OLD_ATTENTION else key

    return {renamed(key): value for key, value in state.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds no settings by name.")
    return found


def _write(path: Path, plain: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(plain, indent=2) + "\n")
