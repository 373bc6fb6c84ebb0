"""`ebm-defense checkpoints`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ebm_defense.errors import UsageError
from ebm_defense.folders import find_folder, shipped, verify
from ebm_defense.weights import import_published_cifar10

PUBLISHED_CIFAR10 = "ebm-defense-cifar10"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """List the shipped defenses, verify their hashes, or import published weights.

    ebm-defense checkpoints import ebm-defense-cifar10 --ebm ebm.pth --clf clf.pth
    turns the release of Hill, Mitchell, Zhu (2021) into a defense folder.
    """

    action: Annotated[Literal["list", "verify", "import"], tyro.conf.Positional] = "list"
    """What to do."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """verify: a shipped name or a folder instead of all shipped; import: ebm-defense-cifar10."""
    ebm: Path | None = None
    """import: the energy's state_dict."""
    clf: Path | None = None
    """import: the classifier's state_dict."""
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
        if self.name != PUBLISHED_CIFAR10:
            raise UsageError(
                f"unknown weights {self.name!r} to import; there is {PUBLISHED_CIFAR10}."
            )
        if self.ebm is None or self.clf is None:
            raise UsageError("import needs --ebm and --clf, the two files of the release.")
        folder = import_published_cifar10(self.ebm, self.clf, self.out)
        print(f"the defense is {folder}; evaluate it with --defense {folder} --data cifar10")
