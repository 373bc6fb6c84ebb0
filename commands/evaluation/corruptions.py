"""`ebm-defense corruptions`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ebm_defense.attacks.corruptions.made import CORRUPTIONS, SEVERITIES
from ebm_defense.attacks.corruptions.read import corruptions_in, read_corrupted
from ebm_defense.commands.options.photos import Photos, Wanted, wanted_by
from ebm_defense.commands.options.shared import Device, put_on, resolve_device
from ebm_defense.data import Images, stratified_order
from ebm_defense.eval.corruptions import Make, evaluate_corruptions
from ebm_defense.eval.storage.settings import default_folder
from ebm_defense.storage.files import writable_folder
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class Corruptions:
    """Measure a defense on common corruptions: fifteen kinds at five severities.

    They are made of any data set, or read with --folder from files laid out as CIFAR-10-C is.
    Prints a table of mean accuracies, defended and undefended.
    """

    defense: str = "fashion-mnist"
    """A shipped defense or a folder."""
    data: str = "fashion-mnist-sample"
    """Data set."""
    data_root: Path | None = None
    """Where the data set lies."""
    photos: Photos = field(default_factory=Photos)
    split: str = "test"
    """train, val or test."""
    images: int = 40
    """How many images, a stratified sample; each is corrupted in every way."""
    folder: Path | None = None
    """Read corrupted images from this folder instead: NAME.npy of five severities, labels.npy."""
    corruption: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this corruption; may be given several times."""
    severity: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Only this severity, 1 to 5; may be given several times."""
    replicates: int | None = None
    """Fresh replicates an image; the defense's own number if not given."""
    langevin_steps: int | None = None
    """Langevin steps K, instead of the defense's own."""
    max_chains: int | None = None
    """Chains that run at a time, which bounds memory; if not given, 400 on a CPU and as many as
    fit on a GPU."""
    device: Device = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of the corruptions and of the defense's draws."""
    out: Path | None = None
    """Run folder; the same command goes on in it. A new one under runs/ if not given."""

    def run(self) -> int:
        """Corrupt or read, classify, print."""
        device = resolve_device(self.device)
        options = {"steps": self.langevin_steps, "max_chains": self.max_chains}
        defense = put_on(load_defense(self.defense, **options), device)
        data, make = self._data(device, wanted_by(defense))
        out = writable_folder(self.out or default_folder())
        report = evaluate_corruptions(
            defense,
            data.images.to(device),
            data.labels.to(device),
            corruptions=self._names(),
            severities=self.severity or SEVERITIES,
            make=make,
            source="made here" if self.folder is None else f"read from {self.folder.name}",
            replicates=self.replicates,
            seed=self.seed,
            out=out,
        )
        print(f"\n{report.to_markdown()}\nEverything was saved in {out}")
        return 0

    def _names(self) -> list[str]:
        known = list(CORRUPTIONS) if self.folder is None else corruptions_in(self.folder)
        return list(self.corruption) or known

    def _data(self, device: torch.device, wanted: Wanted) -> tuple[Images, Make | None]:
        """Return the clean images, or the mildest of the files, and what reads the others."""
        if self.folder is None:
            source = self.photos.open(self.data, self.split, self.data_root, wanted)
            return source.take(self.images), None
        folder, first = self.folder, self._names()[0]
        every = read_corrupted(folder, first, 1)
        rows = stratified_order(every.labels, 0)[: self.images]

        def make(name: str, severity: int) -> Images:
            found = read_corrupted(folder, name, severity, rows)
            return Images(found.images.to(device), found.labels.to(device))

        return Images(every.images[rows], every.labels[rows]), make
