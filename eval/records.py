"""What a run keeps of each image, and the folder it keeps it in."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.protocol import Protocol, describe
from ebm_defense.files import load_tensors, save_tensors, writable_folder, write_text
from ebm_defense.fingerprint import digest, fingerprint
from ebm_defense.purifiers import LangevinPurifier
from ebm_defense.weights import sha256

SETTINGS, ENVIRONMENT, RECORDS = "settings.toml", "environment.toml", "records.csv"
ADVERSARIAL = "adversarial.safetensors"
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
        "defense": {
            "replicates": defense.replicates,
            "average": defense.average,
            "weights": fingerprint(defense),
            "purifier": purifier_settings(defense, images),
        },
        "data": {"images": len(images), "sha256": digest([images, labels])},
    }


def purifier_settings(defense: PurifiedClassifier, images: Tensor) -> dict[str, Any]:
    """Return the purifier's name and numbers, as plain values."""
    purifier = defense.purifier
    settings: dict[str, Any] = {"kind": type(purifier).__name__}
    if isinstance(purifier, LangevinPurifier):
        settings |= describe(purifier.settings) | {"kind": "LangevinPurifier"}
        settings["precision"] = purifier.resolved_precision(images)
    plain = {k: v for k, v in vars(purifier).items() if isinstance(v, int | float | str)}
    return settings | {k: v for k, v in plain.items() if k not in ("training", "precision")}


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


class RunFolder:
    """A run on disk: its settings, one pair of files a finished shard, and at the end the whole.

    Args:
        path: the folder, made if it is not there.
        settings: from `settings_of`.

    Raises:
        UsageError: the folder cannot be written, or holds a run of other settings.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = writable_folder(path)
        self._claim(settings)
        self.shards = writable_folder(self.path / "shards")

    def _claim(self, settings: dict[str, Any]) -> None:
        file, text = self.path / SETTINGS, tomli_w.dumps(settings)
        if not file.exists():
            if any(self.path.iterdir()):
                raise UsageError(
                    f"{self.path} is not empty and holds no run of ours; name another folder."
                )
            write_text(file, text)
        elif differing := _differences(_read_toml(file), settings):
            raise UsageError(
                f"{self.path} holds a run of other settings ({', '.join(differing)}); "
                "name another folder, or repeat that run's command to resume it."
            )

    def load_shard(self, start: int) -> Shard | None:
        """Return the shard that begins with image `start`, or None if it is not finished."""
        records, images, sums = self._files(start)
        if not sums.exists():
            return None
        for file, listed in zip((records, images), sums.read_text().split(), strict=False):
            if not file.exists() or sha256(file) != listed:
                raise UsageError(
                    f"{file} is damaged or was changed; delete {sums} to run that shard again."
                )
        return pd.read_csv(records), load_tensors(images)

    def save_shard(self, start: int, shard: Shard) -> None:
        """Keep a finished shard."""
        records, images, sums = self._files(start)
        save_tensors(images, shard[1])
        write_text(records, shard[0].to_csv(index=False))
        # Written last: it vouches for both, and without it the shard is not finished.
        write_text(sums, f"{sha256(records)} {sha256(images)}\n")

    def finish(self, shard: Shard, times: dict[str, Any]) -> None:
        """Write the whole run's records, adversarial images and environment."""
        write_text(self.path / RECORDS, shard[0].to_csv(index=False))
        save_tensors(self.path / ADVERSARIAL, shard[1])
        write_text(self.path / ENVIRONMENT, tomli_w.dumps(environment() | {"run": times}))

    def _files(self, start: int) -> tuple[Path, Path, Path]:
        stem = f"{start:06d}"
        return (
            self.shards / f"{stem}.csv",
            self.shards / f"{stem}.safetensors",
            self.shards / f"{stem}.sha256",
        )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged ({error}); name another folder.") from error


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the dotted names under which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            name
            for key in sorted({*old, *new})
            for name in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [n for i, (a, b) in pairs for n in _differences(a, b, f"{path}[{i}]")]
    return [] if old == new else [path]


def join(shards: list[Shard]) -> Shard:
    """Join shards, in the order given."""
    records = pd.concat([s[0] for s in shards], ignore_index=True)
    names = shards[0][1]
    return records, {name: torch.cat([s[1][name] for s in shards]) for name in names}


def default_folder() -> Path:
    """Return a new folder name for a run, by date and process."""
    stamp = pd.Timestamp.now().strftime("%Y-%m-%d-%H%M%S")
    return Path("runs") / f"{stamp}-{os.getpid()}"
