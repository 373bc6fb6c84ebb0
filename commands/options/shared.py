"""What several commands share: devices, and parts named on the command line."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
import torch
import tyro
from torch import nn

from ebm_defense.attacks.spec import parse
from ebm_defense.commands.options.factories import factory
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.foreign import as_purifier
from ebm_defense.purifiers.registry import PURIFIERS, baseline, needs_networks
from ebm_defense.storage import hub
from ebm_defense.storage.files import write_text
from ebm_defense.storage.folders import DEFENSE, find_folder, names_folder, read_settings
from ebm_defense.storage.weights import load_purifier

M = TypeVar("M", bound=nn.Module)
Device = Literal["auto", "cpu", "cuda", "mps"]


Fraction = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: real(words[0], "the number"),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A number that may be written as a fraction: 8/255."""


def resolve_device(device: Device) -> torch.device:
    """Return the device, which on a GPU is from now on this process's own.

    "auto" is a GPU (CUDA or ROCm) where torch sees one, else the CPU; under torchrun each process
    takes the GPU of its number (LOCAL_RANK).

    Raises:
        UsageError: a device that is not here, or more processes than GPUs.
    """
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps was asked for, but torch sees no Apple GPU; use cpu.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("CUDA was asked for, but torch sees no GPU here; use --device cpu.")
    if device in ("cpu", "mps") or not torch.cuda.is_available():
        return torch.device("mps" if device == "mps" else "cpu")
    own = torch.device("cuda", _own_gpu(torch.cuda.device_count()))
    torch.cuda.set_device(own)
    return own


def _own_gpu(count: int) -> int:
    """Return the number of this process's GPU: torchrun starts a process a GPU and numbers them."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return torch.cuda.current_device()
    if not rank.isdecimal() or int(rank) >= count:
        raise UsageError(
            f"this is process {rank} of torchrun's on this machine (LOCAL_RANK), which has "
            f"{count} GPUs; start at most as many (--nproc-per-node {count}), or use --device cpu."
        )
    return int(rank)


def put_on(module: M, device: torch.device) -> M:
    """Move a module to a device."""
    return module.to(device)


def make_purifier(spec: str, steps: int | None = None, adjusted: bool | None = None) -> Purifier:
    """Make a purifier from a shipped name, a folder, a baseline ("jpeg:75"), the name of a purifier
    of networks and its folder ("hat:FOLDER" or "diffusion:FOLDER(steps=20)"), or module:factory.

    A folder's chain takes `steps`, and a Metropolis test if `adjusted`, instead of its own; None
    keeps them.

    Raises:
        UsageError: nothing of that name, a folder of another purifier, or no chain that could be
            adjusted.
    """
    kind, colon, place = spec.partition(":")
    if names_folder(spec):
        return load_purifier(spec, steps=steps, adjusted=adjusted)
    if colon and kind in PURIFIERS and needs_networks(PURIFIERS[kind]):
        return _of_networks(kind, place, steps=steps, adjusted=adjusted)
    if adjusted:
        raise UsageError(f"--adjusted is for the Langevin chain of a defense folder, not {spec}.")
    return as_purifier(factory(spec)()) if colon and kind not in PURIFIERS else baseline(spec)


def _of_networks(kind: str, place: str, **chain: Any) -> Purifier:
    """Make a purifier of the networks in a place, with the settings that stand behind it."""
    named, settings = parse(place)
    settings = {k: v for k, v in chain.items() if v is not None} | settings
    if not _is_defense(named):
        return PURIFIERS[kind].opened(named, **settings)
    refuse_another_purifier(named, kind)
    return load_purifier(named, **settings)


def _is_defense(place: str) -> bool:
    """Whether a place holds a defense, and not networks alone as others publish them."""
    if hub.is_address(place):
        return (hub.download(place) / DEFENSE).is_file()
    return names_folder(place)


def refuse_another_purifier(folder: str, kind: str) -> None:
    """Refuse a folder of another purifier than it was named with."""
    found = read_settings(find_folder(folder)).purifier.name
    if found != kind:
        raise UsageError(
            f"{folder} holds a purifier {found}, not {kind}; name it {found}:{folder}."
        )


SETTINGS = "settings.toml"


def write_settings(folder: Path, command: Any, name: str = SETTINGS) -> None:
    """Write a command's options as a TOML file, which --config takes again."""
    write_text(folder / name, tomli_w.dumps(plain(command)))


def plain(command: Any) -> dict[str, Any]:
    """Return a command's options as plain values, without those that were not given."""
    values: dict[str, Any] = _plain(dataclasses.asdict(command))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
