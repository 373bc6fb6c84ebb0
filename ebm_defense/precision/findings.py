"""What was shown of some weights on some kind of device: shipped, kept in the cache, looked up."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ebm_defense.storage.files import atomic
from ebm_defense.storage.fingerprint import fingerprint

SHOWN = "findings.json"
F = TypeVar("F")

_log = logging.getLogger("ebm_defense.precision")


def key_of(network: nn.Module, device: torch.device, **about: Any) -> str:
    """Return what a finding is about: weights, network, kind of device, and what else is named."""
    parts = about | {
        "weights": fingerprint(network),
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
    for found, _ in located(key, kind):
        yield found


def located(key: str, kind: type[F]) -> Iterator[tuple[F, str]]:
    """Yield the findings of a kind as `look_up` does, each with where it was found."""
    shown = Path(str(files("ebm_defense.precision").joinpath(SHOWN)))
    for path, where in ((shown, "that ships"), (_cached(key), f"in {_cached(key)}")):
        try:
            found = kind(**json.loads(path.read_text(encoding="utf-8"))[key])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent, of another version or damaged: as if nothing were known
        yield found, where


@cache
def say_used(what: str, where: str) -> None:
    """Say once by which finding a faster precision is taken."""
    _log.info("%s, by the finding %s.", what, where)


def keep(key: str, finding: Any) -> Path:
    """Write a finding to the user's cache and return where; a cache that cannot be written is only
    logged.
    """
    path = _cached(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps({key: asdict(finding)}), encoding="utf-8")
    except OSError as error:
        _log.warning("a finding cannot be kept in %s (%s).", path, error.strerror)
    return path


@cache
def say_unknown(precision: str, steps: int) -> None:
    """Say once that a faster precision is not taken, since no finding allows it."""
    _log.info(
        "chains of %d steps are not run in %s, which no finding allows here; "
        "`ebm-defense precision` compares it with fp32.", steps, precision,
    )  # fmt: skip


def versions(network: object) -> list[tuple[int, int]]:
    """Return what changes when a network's weights are replaced or updated in place."""
    parameters = network.parameters() if isinstance(network, nn.Module) else ()
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]


def _cached(key: str) -> Path:
    from ebm_defense.data import cache_folder

    return cache_folder() / "precision" / f"{key}.json"
