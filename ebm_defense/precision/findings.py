"""What was shown of some weights on some kind of device: shipped, kept in the cache, looked up."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ebm_defense.files import atomic
from ebm_defense.fingerprint import raw_bytes

SHOWN = "findings.json"
F = TypeVar("F")

_log = logging.getLogger("ebm_defense")


def key_of(network: nn.Module, device: torch.device, **about: Any) -> str:
    """Return what a finding is about: weights, network, kind of device, and what else is named."""
    weights = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        weights.update(name.encode() + raw_bytes(value))
    parts = about | {
        "weights": weights.hexdigest(),
        "network": repr(network),
        "device": device_kind(device),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def device_kind(device: torch.device) -> str:
    """Return "cpu" with its architecture, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()}"


def look_up(key: str, kind: type[F]) -> Iterator[F]:
    """Yield the findings of a kind, a dataclass, that the package and the user's cache hold."""
    shown = files("ebm_defense.precision").joinpath(SHOWN)
    for path in (Path(str(shown)), _cached(key)):
        try:
            yield kind(**json.loads(path.read_text(encoding="utf-8"))[key])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent, of another version or damaged: as if nothing were known


def keep(key: str, finding: Any) -> None:
    """Write a finding to the user's cache; a cache that cannot be written is only logged."""
    path = _cached(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps({key: asdict(finding)}), encoding="utf-8")
    except OSError as error:
        _log.warning("a finding cannot be kept in %s (%s).", path, error.strerror)


def versions(network: object) -> list[tuple[int, int]]:
    """Return what changes when a network's weights are replaced or updated in place."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def _cached(key: str) -> Path:
    from ebm_defense.data import cache_folder

    return cache_folder() / "precision" / f"{key}.json"
