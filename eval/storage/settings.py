"""What a run keeps: all that its records depend on, the records, and where they were made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.storage.fingerprint import digest, fingerprint
from ebm_defense.storage.serialize import describe

PACKAGES = ("ebm-defense", "torch", "torchvision", "numpy", "scipy")

Shard = tuple[pd.DataFrame, dict[str, Tensor]]
"""The records of some images, and their adversarial images by attack."""


def settings_of(
    defense: PurifiedClassifier, images: Tensor, labels: Tensor, protocol: Protocol, seed: int
) -> dict[str, Any]:
    """Return all that a run's records depend on, as plain values for TOML."""
    return {
        "seed": seed,
        "protocol": describe(protocol),
        "defense": {"replicates": defense.replicates, **judge_settings(defense, images)},
        "data": {"images": len(images), "sha256": digest([images, labels])},
    }


def judge_settings(defense: PurifiedClassifier, images: Tensor) -> dict[str, Any]:
    """Return all of a defense that verdicts on these images depend on, but the draws."""
    return {
        "average": defense.average,
        "weights": fingerprint(defense),
        "purifier": defense.purifier.record(images) | _randomness(defense),
        "verdicts": defense.resolved_verdict_precision(images),
    }


def _randomness(defense: PurifiedClassifier) -> dict[str, bool]:
    """Return what was found of a defense whose purifier calls itself deterministic."""
    return {} if defense.purifier.stochastic else {"stochastic": defense.stochastic}


def environment() -> dict[str, Any]:
    """Return versions and hardware: what a run's times depend on, and its records should not."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "packages": packages,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def join(shards: list[Shard]) -> Shard:
    """Join shards, in the order given."""
    records = pd.concat([s[0] for s in shards], ignore_index=True)
    names = shards[0][1]
    return records, {name: torch.cat([s[1][name] for s in shards]) for name in names}


def default_folder() -> Path:
    """Return a new folder name for a run, by date and process."""
    stamp = pd.Timestamp.now().strftime("%Y-%m-%d-%H%M%S")
    return Path("runs") / f"{stamp}-{os.getpid()}"
