"""`ebm-defense precision`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from ebm_defense.commands.options.photos import Photos, wanted_by
from ebm_defense.commands.options.shared import Device, put_on, resolve_device
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.noise import chain_keys
from ebm_defense.precision.classifiers import agreement_key, compare
from ebm_defense.precision.findings import keep
from ebm_defense.storage.folders import find_folder, read_settings
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Compare bf16 with fp32 on a defense, and keep what is found for `--precision auto`.

    Chains of both precisions start from the same images and feel the same noise. From then on, on
    this kind of device, bf16 is taken for chains whose energies, images and accuracy differ by less
    than the margins, on a GPU TF32 likewise, and bf16 for verdicts that name the same classes.
    """

    defense: Annotated[str, tyro.conf.Positional] = "fashion-mnist"
    """A shipped defense or a folder."""
    data: str | None = None
    """Data set; the one that the defense was made for if not given."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "val"
    """train, val or test."""
    images: int = 1000
    """How many images, a stratified sample, and a chain from each; few show wide margins only."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> int:
        """Compare, keep, print."""
        device = resolve_device(self.device)
        name = self.data or read_settings(find_folder(self.defense)).data
        if not name:
            raise UsageError(f"the defense {self.defense} names no data set; give --data.")
        defense = put_on(load_defense(self.defense), device)
        source = self.photos.open(name, self.split, self.data_root, wanted_by(defense))
        images, labels = (part.to(device) for part in source.take(self.images))
        found = compare_precisions(defense, images, labels)
        for what, (key, finding) in found.items():
            allowed = "taken" if finding.equivalent else "not taken"
            numbers = {k: v for k, v in asdict(finding).items() if k != "equivalent"}
            shown = ", ".join(f"{k} {_short(v)}" for k, v in numbers.items() if v is not None)
            print(f"{what}: {allowed} ({shown}); kept in {keep(key, finding)}")
        return 0


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def compare_precisions(
    defense: PurifiedClassifier, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, tuple[str, Any]]:
    """Return what is found of a defense's chains and verdicts, each after its key.

    Args:
        defense: a loaded defense.
        images: `[n, C, H, W]` in [0, 1], a chain from each.
        labels: true classes `[n]`.
    """
    found: dict[str, tuple[str, Any]] = {}
    chains = defense.purifier.compare_precisions(images, defense.classifier, labels)
    found |= {f"chains in {precision}": one for precision, one in chains.items()}
    keys = chain_keys(0, "precision", range(len(images)), range(1))
    with torch.no_grad():
        purified = defense.purify_replicates(images, keys)[0]
    key = agreement_key(defense.classifier, images.device)
    found["verdicts in bf16"] = key, compare(defense.classifier, purified)
    return found
