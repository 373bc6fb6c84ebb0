"""`ebm-defense checkpoints`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ebm_defense.errors import UsageError
from ebm_defense.storage.folders import find_folder, shipped, verify
from ebm_defense.storage.weights import import_published_cifar10, import_zoo_cifar10

PUBLISHED_CIFAR10, ZOO = "ebm-defense-cifar10", "robustbench"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """List the shipped defenses, verify their hashes, or import published weights.

    ebm-defense checkpoints import ebm-defense-cifar10 --ebm ebm.pth --clf clf.pth
    turns the release of Hill, Mitchell, Zhu (2021) into a defense folder; import robustbench puts
    the same energy before a wide ResNet of RobustBench's layout.
    """

    action: Annotated[Literal["list", "verify", "import"], tyro.conf.Positional] = "list"
    """What to do."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """verify: a shipped name or a folder instead of all shipped; import: ebm-defense-cifar10 or
    robustbench."""
    ebm: Path | None = None
    """import: the energy's state_dict."""
    clf: Path | None = None
    """import: the classifier's state_dict, bare or in what surrounds it."""
    mean: float = 0.0
    """import robustbench: mean of the classifier's normalisation; most take [0, 1] as it is."""
    std: float = 1.0
    """import robustbench: its standard deviation."""
    out: Path = Path(PUBLISHED_CIFAR10)
    """import: the defense folder to write."""

    def run(self) -> int:
        """Do what was asked."""
        {"list": self._list, "verify": self._verify, "import": self._import}[self.action]()
        return 0

    def _list(self) -> None:
        for name, settings in shipped():
            print(f"{name:<24} {settings.description}")

    def _verify(self) -> None:
        for name in [self.name] if self.name else [s.name for s in shipped()]:
            folder = find_folder(name)
            verify(folder)
            print(f"{folder.name}: every file is the one that SHA256SUMS lists")

    def _import(self) -> None:
        if self.name not in (PUBLISHED_CIFAR10, ZOO):
            raise UsageError(
                f"unknown weights {self.name!r} to import; there are {PUBLISHED_CIFAR10} and {ZOO}."
            )
        if self.ebm is None or self.clf is None:
            raise UsageError(
                "import needs --ebm and --clf, the energy's file and the classifier's."
            )
        if self.name == ZOO:
            scale = {"mean": self.mean, "std": self.std}
            folder = import_zoo_cifar10(self.ebm, self.clf, self.out, **scale)
        else:
            folder = import_published_cifar10(self.ebm, self.clf, self.out)
        print(f"the defense is {folder}; evaluate it with --defense {folder} --data cifar10")
