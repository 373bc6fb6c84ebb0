"""`ebm-defense checkpoints`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ebm_defense.errors import UsageError
from ebm_defense.storage import hub
from ebm_defense.storage.files import atomic, writable_folder
from ebm_defense.storage.folders import (
    find_folder,
    learned,
    learned_folder,
    read_settings,
    shipped,
    verify,
)
from ebm_defense.storage.layouts import export_weights, import_weights
from ebm_defense.storage.weights import load_defense

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """List and verify defenses, import and export published weights, publish a defense.

    ebm-defense checkpoints import ebm-defense-cifar10 --ebm ebm.pth --clf clf.pth
    turns the release of Hill, Mitchell, Zhu (2021) into a defense folder, and import puregen or
    import mefa does so with those papers' energies; the classifier is a wide ResNet of the first
    release or of RobustBench. export writes a defense's networks as such files. publish copies a
    defense to a folder, or to the Hub: checkpoints publish FOLDER hf://owner/name.
    """

    action: Annotated[
        Literal["list", "verify", "import", "export", "publish"], tyro.conf.Positional
    ] = "list"
    """What to do."""
    name: Annotated[str | None, tyro.conf.Positional] = None
    """verify: a shipped name, a folder or hf://owner/name instead of all shipped; import:
    ebm-defense-cifar10, robustbench, puregen or mefa; export, publish: which defense."""
    target: Annotated[str | None, tyro.conf.Positional] = None
    """publish: hf://owner/name, hf://owner/name@branch, or a folder."""
    ebm: Path | None = None
    """import: the energy's state_dict, bare or in what surrounds it."""
    clf: Path | None = None
    """import: the classifier's state_dict, likewise."""
    activation: str | None = None
    """import: the energy's activation, where its paper published several: leaky_relu, relu,
    soft_lrelu or silu."""
    mean: float | None = None
    """import: mean of the classifier's normalisation; if not given 0.5 for the first release's, and
    0 for RobustBench's, of which most take [0, 1] as it is."""
    std: float | None = None
    """import: its standard deviation; if not given 0.5, and 1."""
    private: bool = False
    """publish: make a new repository private."""
    out: Path | None = None
    """import: the defense folder to write; export: the folder for the state_dicts."""

    def run(self) -> int:
        """Do what was asked."""
        {
            "list": self._list,
            "verify": self._verify,
            "import": self._import,
            "export": self._export,
            "publish": self._publish,
        }[self.action]()
        return 0

    def _list(self) -> None:
        for name, settings in shipped():
            print(f"{name:<24} {settings.description}")
        for name in learned():
            print(f"{name:<24} An energy alone, with its recipe, for diagnose and load_energy.")

    def _verify(self) -> None:
        every = [*[s.name for s in shipped()], *learned()]
        for name in [self.name] if self.name else every:
            folder = learned_folder(name) or find_folder(name)
            verify(folder)
            print(f"{name}: every file is the one that SHA256SUMS lists")

    def _import(self) -> None:
        if self.ebm is None or self.clf is None:
            raise UsageError(
                "import needs --ebm and --clf, the energy's file and the classifier's."
            )
        folder = import_weights(
            self._named(),
            self.ebm,
            self.clf,
            self.out or Path(self._named()),
            activation=self.activation,
            mean=self.mean,
            std=self.std,
        )
        print(f"the defense is {folder}; evaluate it with --defense {folder} --data cifar10")

    def _export(self) -> None:
        if self.out is None:
            raise UsageError("export needs --out, the folder for the state_dicts.")
        defense = load_defense(self._named())
        for part, file in export_weights(defense, self.out).items():
            print(f"{part:<12} {file}")
        energy = defense.purifier.networks.get("energy")
        activation = getattr(getattr(energy, "settings", None), "activation", None)
        if activation is not None:
            print(f"the files do not say the energy's activation: it is {activation}")

    def _publish(self) -> None:
        if self.target is None:
            raise UsageError(f"publish needs where to: {hub.FORM}, or a folder.")
        folder = find_folder(self._named())
        verify(folder)
        if hub.is_address(self.target):
            card = _card(folder, self.target)
            print(hub.upload(folder, self.target, private=self.private, card=card))
        else:
            print(f"the defense is {_copy(folder, Path(self.target).expanduser())}")

    def _named(self) -> str:
        if self.name is None:
            raise UsageError(f"{self.action} needs a name; see checkpoints --help.")
        return self.name


def _copy(folder: Path, target: Path) -> Path:
    """Copy a defense's files, each whole or not at all, and check what came."""
    if target.exists() and target.samefile(folder):
        raise UsageError(f"{target} is the defense itself; name another folder.")
    path = writable_folder(target)
    if any(path.iterdir()):
        raise UsageError(f"{target} is not empty; name a new folder.")
    for pattern in hub.PATTERNS:
        for file in sorted(folder.glob(pattern)):
            with atomic(path / file.name) as partial:
                shutil.copyfile(file, partial)
    verify(path)
    return path


def _card(folder: Path, target: str) -> str:
    """Return a model card for a folder that has none."""
    said = read_settings(folder)
    data = f"\n\nIt was made for the data set `{said.data}`." if said.data else ""
    return (
        "---\nlibrary_name: ebm-defense\ntags: [adversarial-robustness, energy-based-model]\n---\n"
        f"# {hub.address(target).repository}\n\n{said.description or 'A purified classifier.'}"
        f"{data}\n\n```python\nfrom ebm_defense import load_defense\n\n"
        f'defense = load_defense("{target}")\n```\n'
    )
