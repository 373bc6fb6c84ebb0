"""Defenses on disk: load, verify, save and import weights.

A defense is a folder: `defense.toml` says what it is made of, `*.safetensors` hold the weights, and
`SHA256SUMS` vouches for them; the shipped ones have a model card, `README.md`, beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from torch import nn

from ebm_defense.classifiers import Normalized, WideResNet, WideResNetSettings, normalized
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, channels_last
from ebm_defense.errors import UsageError
from ebm_defense.files import save_tensors, writable_folder, write_text
from ebm_defense.langevin import LangevinSettings
from ebm_defense.purifiers.base import GaussianNoise, LangevinPurifier, Purifier
from ebm_defense.state_dicts import about, load_weights

CHAIN_OPTIONS = ("steps", "precision")
DEFENSE, SUMS = "defense.toml", "SHA256SUMS"
CLASSIFIER, ENERGY, UNDEFENDED = (
    "classifier.safetensors",
    "energy.safetensors",
    "undefended.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A `WideResNet` and the normalisation in front of it, in [0, 1] units."""

    network: WideResNetSettings = field(default_factory=WideResNetSettings)
    mean: float = 0.5
    std: float = 0.5


@dataclass(frozen=True, kw_only=True)
class DefenseSettings:
    """What `defense.toml` holds.

    Attributes:
        description: one sentence for lists.
        data: the data set it was made for.
        replicates: purifications an image.
        average: how replicates are averaged.
        classifier: the network behind the purifier.
        undefended: the separate undefended classifier, if one is kept.
        energy, langevin: of a Langevin purifier.
        noise: standard deviation in [0, 1] units, of a Gaussian-noise purifier.
    """

    description: str = ""
    data: str = ""
    replicates: int = 16
    average: str = "logits"
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    undefended: ClassifierSettings | None = None
    energy: ConvEnergySettings | None = None
    langevin: LangevinSettings | None = None
    noise: float | None = None


class Shipped(NamedTuple):
    """A shipped defense's name and settings."""

    name: str
    settings: DefenseSettings


def shipped_folder() -> Path:
    """Return the folder of the weights that ship with the package."""
    return Path(str(files("ebm_defense.checkpoints")))


def shipped() -> list[Shipped]:
    """Return the shipped defenses, by name."""
    folders = sorted(p.parent for p in shipped_folder().glob(f"*/{DEFENSE}"))
    return [Shipped(folder.name, read_settings(folder)) for folder in folders]


def find_folder(name: str | Path) -> Path:
    """Return the folder of a shipped defense or the folder that was named.

    Raises:
        UsageError: neither exists.
    """
    for folder in (shipped_folder() / str(name), Path(name).expanduser()):
        if (folder / DEFENSE).is_file():
            return folder
    names = ", ".join(s.name for s in shipped())
    raise UsageError(
        f"there is no defense {str(name)!r}: give a shipped name ({names}) or a folder with a "
        f"{DEFENSE}."
    )


def load_defense(name: str | Path = "fashion-mnist", **options: Any) -> PurifiedClassifier:
    """Load a classifier and its purifier together.

    Args:
        name: a shipped name or a folder.
        **options: `steps` and `precision` of the Langevin purifier (None keeps its own); the rest
            goes to `PurifiedClassifier` (replicates, average, max_chains, seed).

    Raises:
        UsageError: no such defense, or a file that is missing, damaged or not the one hashed.
    """
    folder = find_folder(name)
    verify(folder)
    settings = read_settings(folder)
    bare = settings.undefended
    chain = {k: options.pop(k, None) for k in CHAIN_OPTIONS}
    defaults: dict[str, Any] = {"replicates": settings.replicates, "average": settings.average}
    return PurifiedClassifier(
        _classifier(folder / CLASSIFIER, settings.classifier),
        _purifier(folder, settings, chain),
        undefended=None if bare is None else _classifier(folder / UNDEFENDED, bare),
        **(defaults | options),
    )


def load_purifier(name: str | Path = "fashion-mnist", **options: Any) -> Purifier:
    """Load a purifier alone, to put before a classifier of your own.

    Args:
        name: a shipped name or a folder.
        **options: `steps` and `precision` of a Langevin purifier.

    Raises:
        UsageError: as `load_defense`.
    """
    folder = find_folder(name)
    verify(folder)
    return _purifier(folder, read_settings(folder), options)


def load_energy(name: str | Path = "fashion-mnist") -> ConvEnergy:
    """Load an energy alone: `[N, C, H, W]` in [-1, 1] to `[N]`.

    Raises:
        UsageError: as `load_defense`, or a defense without an energy.
    """
    folder = find_folder(name)
    verify(folder)
    settings = read_settings(folder)
    if settings.energy is None:
        raise UsageError(f"the defense {name} has no energy; its purifier is not an EBM.")
    return _energy(folder / ENERGY, settings.energy)


def read_settings(folder: Path) -> DefenseSettings:
    """Read `defense.toml`; unknown keys are refused by name."""
    from ebm_defense.serialize import from_plain

    file = folder / DEFENSE
    try:
        plain = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}).") from error
    return from_plain(DefenseSettings, plain, str(file))


def verify(folder: Path) -> None:
    """Check every file of a defense against its SHA256SUMS.

    Raises:
        UsageError: a file is missing, not listed or differs.
    """
    sums = _sums(folder)
    for name in _listed(folder):
        if name not in sums:
            raise UsageError(f"{folder / name} is not listed in {SUMS}; save the defense again.")
    for name, digest in sums.items():
        file = folder / name
        if not file.is_file():
            raise UsageError(f"{file} is missing; restore it, or save the defense again.")
        if sha256(file) != digest:
            raise UsageError(
                f"{file} is not the file that {SUMS} lists (its SHA-256 differs); restore it, or "
                "save the defense again if the change was yours."
            )


def _sums(folder: Path) -> dict[str, str]:
    file = folder / SUMS
    if not file.is_file():
        raise UsageError(f"{file} is missing, so nothing vouches for the weights; save them again.")
    lines = file.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines) if name}


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """List the SHA-256 of a folder's settings and weights, as sha256sum does."""
    lines = [f"{sha256(folder / name)}  {name}\n" for name in _listed(folder)]
    write_text(folder / SUMS, "".join(lines))


def _listed(folder: Path) -> list[str]:
    return [DEFENSE, *sorted(p.name for p in folder.glob("*.safetensors"))]


def save_defense(
    defense: PurifiedClassifier, folder: str | Path, *, description: str = "", data: str = ""
) -> Path:
    """Write a defense of this package's own networks to a folder that `load_defense` reads.

    Raises:
        UsageError: a classifier, energy or purifier whose shape cannot be written down, or a
            folder that cannot be written.
    """
    settings = dataclasses.replace(_settings(defense), description=description, data=data)
    path = writable_folder(folder)
    scales = {CLASSIFIER: settings.classifier, UNDEFENDED: settings.undefended}
    for name, module in _parts(defense).items():
        scale = scales.get(name)
        more = {} if scale is None else {"mean": scale.mean, "std": scale.std}
        save_tensors(path / name, module.state_dict(), about(module, data=data, **more))
    plain = _without_none(dataclasses.asdict(settings))
    write_text(path / DEFENSE, tomli_w.dumps(plain))
    write_sums(path)
    return path


def _parts(defense: PurifiedClassifier) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {CLASSIFIER: _network(defense.classifier)}
    if isinstance(defense.purifier, LangevinPurifier):
        assert isinstance(defense.purifier.energy, nn.Module)
        parts[ENERGY] = defense.purifier.energy
    if defense.undefended is not defense.classifier:
        parts[UNDEFENDED] = _network(defense.undefended)
    return parts


def _network(classifier: nn.Module) -> nn.Module:
    return classifier.classifier if isinstance(classifier, Normalized) else classifier


def _settings(defense: PurifiedClassifier) -> DefenseSettings:
    purifier = defense.purifier
    bare = None if defense.undefended is defense.classifier else defense.undefended
    settings = DefenseSettings(
        replicates=defense.replicates,
        average=defense.average,
        classifier=_classifier_settings(defense.classifier),
        undefended=None if bare is None else _classifier_settings(bare),
    )
    if isinstance(purifier, LangevinPurifier) and isinstance(purifier.energy, ConvEnergy):
        shape, chain = purifier.energy.settings, purifier.settings
        return dataclasses.replace(settings, energy=shape, langevin=chain)
    if isinstance(purifier, GaussianNoise):
        return dataclasses.replace(settings, noise=purifier.std)
    raise UsageError(
        "only Langevin purifiers on a ConvEnergy and Gaussian noise can be saved, not "
        f"{type(purifier).__name__}; save a purifier of your own by your own code."
    )


def _classifier_settings(classifier: nn.Module) -> ClassifierSettings:
    network = _network(classifier)
    simple = isinstance(classifier, Normalized) and classifier.mean.numel() == 1
    if not isinstance(network, WideResNet) or not simple:
        raise UsageError(
            "only a WideResNet behind normalized(…, mean, std) with one mean and std can be saved, "
            f"not {type(network).__name__}; save a classifier of your own by your own code."
        )
    assert isinstance(classifier, Normalized)
    return ClassifierSettings(
        network=network.settings, mean=float(classifier.mean), std=float(classifier.std)
    )


def _without_none(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {k: _without_none(v) for k, v in plain.items() if v is not None}
    return plain


def _classifier(path: Path, s: ClassifierSettings) -> nn.Module:
    network = WideResNet(s.network)
    load_weights(network, path)
    return normalized(channels_last(network), s.mean, s.std).eval()


def _energy(path: Path, settings: ConvEnergySettings) -> ConvEnergy:
    energy = ConvEnergy(settings)
    load_weights(energy, path)
    channels_last(energy.eval().requires_grad_(False))
    return energy


def _purifier(folder: Path, settings: DefenseSettings, options: dict[str, Any]) -> Purifier:
    if settings.energy is not None and settings.langevin is not None:
        given = {k: v for k, v in options.items() if v is not None}
        chain = dataclasses.asdict(settings.langevin) | given
        return LangevinPurifier(_energy(folder / ENERGY, settings.energy), **chain)
    if settings.noise is None:
        raise UsageError(f"{folder / DEFENSE} names neither an energy with its chain nor a noise.")
    if any(v is not None for v in options.values()):
        raise UsageError(f"{folder.name} runs no chain, so it has no steps or precision to set.")
    return GaussianNoise(settings.noise)


def import_published_cifar10(ebm: Path, clf: Path, folder: str | Path) -> Path:
    """Turn the two state_dicts of the published CIFAR-10 release into a defense folder.

    The release is Hill, Mitchell, Zhu (2021), version 1.0: a conv energy and a WRN-28-10.

    Args:
        ebm: the energy's state_dict, keys f.0 to f.8.
        clf: the classifier's state_dict, 183 entries.
        folder: where to write; then `load_defense(folder)`.

    Raises:
        UsageError: a file that is missing, damaged, or of other keys or shapes.
    """
    energy, network = ConvEnergy(), WideResNet()
    load_weights(energy, ebm)
    load_weights(network, clf)
    defense = PurifiedClassifier(
        normalized(network, 0.5, 0.5), LangevinPurifier(energy), replicates=15
    )
    description = "The published CIFAR-10 defense of Hill, Mitchell, Zhu (2021)."
    return save_defense(defense, folder, description=description, data="cifar10")
