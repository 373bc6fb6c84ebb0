"""Defense folders: what they hold, and how they are written and vouched for.

A defense is a folder: `defense.toml` says what it is made of, `*.safetensors` hold the weights, and
`SHA256SUMS` vouches for them; the shipped ones have a model card, `README.md`, beside them. The
purifier stands in a table of its name in `PURIFIERS`, and each of its networks in one of its own:

    [langevin]
    steps = 50
    ...
    [energy]
    width = 16
    ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import tomllib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w
from torch import Tensor, nn

from ebm_defense.classifiers import Normalized, WideResNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.networks import NETWORKS, Network, NetworkSettings
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.parts import PARTS, USUAL, part_name
from ebm_defense.purifiers.registry import PURIFIERS, name_of
from ebm_defense.storage import hub
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.serialize import from_plain
from ebm_defense.storage.state_dicts import about

if TYPE_CHECKING:
    from ebm_defense.defense import PurifiedClassifier

DEFENSE, RECIPE, SUMS = "defense.toml", "recipe.toml", "SHA256SUMS"
CLASSIFIER, ENERGY, UNDEFENDED, PURIFIER = (
    "classifier.safetensors",
    "energy.safetensors",
    "undefended.safetensors",
    "purifier.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings:
    """A network of `NETWORKS` and the normalisation in front of it, in [0, 1] units."""

    network: NetworkSettings = field(default_factory=WideResNetSettings)
    mean: float = 0.5
    std: float = 0.5


class PurifierSettings(NamedTuple):
    """A purifier as its folder has it.

    Attributes:
        name: in `PURIFIERS`.
        numbers: its plain arguments.
        networks: the names in `PARTS` and the settings of its networks, by argument.
    """

    name: str
    numbers: dict[str, Any]
    networks: dict[str, tuple[str, Any]]


NONE = PurifierSettings("none", {}, {})


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
        purifier: what purifies.
    """

    description: str = ""
    data: str = ""
    replicates: int = 16
    average: str = "logits"
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    undefended: ClassifierSettings | None = None
    purifier: PurifierSettings = NONE


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


def learned() -> list[str]:
    """Return the names of the energies that ship alone, each with its recipe."""
    folders = sorted(p.parent for p in shipped_folder().glob(f"*/{ENERGY}"))
    return [folder.name for folder in folders if not (folder / DEFENSE).is_file()]


def learned_folder(name: str | Path) -> Path | None:
    """Return the folder of an energy alone: a shipped one, or what train-ebm wrote; else None."""
    for folder in (shipped_folder() / str(name), Path(name).expanduser()):
        if (folder / ENERGY).is_file() and not (folder / DEFENSE).is_file():
            return folder
    return None


def find_folder(name: str | Path) -> Path:
    """Return the folder of a shipped defense, one downloaded from the Hub, or the one named.

    Args:
        name: a shipped name, hf://owner/name[@revision], or a path.

    Raises:
        UsageError: there is none, or the Hub has none.
    """
    if hub.is_address(name):
        return _downloaded(str(name))
    for folder in (shipped_folder() / str(name), Path(name).expanduser()):
        if (folder / DEFENSE).is_file():
            return folder
    names = ", ".join(s.name for s in shipped())
    raise UsageError(
        f"there is no defense {str(name)!r}: give a shipped name ({names}), a folder with a "
        f"{DEFENSE}, or {hub.SCHEME}owner/name."
    )


def _downloaded(address: str) -> Path:
    folder = hub.download(address)
    if not (folder / DEFENSE).is_file():
        raise UsageError(f"{address} holds no {DEFENSE}, so it is no defense.")
    return folder


def names_folder(name: str) -> bool:
    """Whether a name is a shipped defense's, an address on the Hub, or a defense folder's path."""
    places = (shipped_folder() / name, Path(name).expanduser())
    return hub.is_address(name) or any((folder / DEFENSE).is_file() for folder in places)


def read_settings(folder: Path) -> DefenseSettings:
    """Read `defense.toml`; unknown keys are refused by name."""
    file = folder / DEFENSE
    try:
        plain = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({error}).") from error
    if "noise" in plain:  # as the first folders named it
        plain["gaussian"] = {"std": plain.pop("noise")}
    purifier = _take_purifier(plain, file)
    settings = from_plain(DefenseSettings, plain, str(file))
    return dataclasses.replace(settings, purifier=purifier)


def _take_purifier(plain: dict[str, Any], file: Path) -> PurifierSettings:
    """Take the tables of the purifier and of its networks out of a folder's settings."""
    names = [name for name in PURIFIERS if name in plain]
    if len(names) != 1:
        raise UsageError(
            f"{file} names {'several purifiers' if names else 'no purifier'} "
            f"({', '.join(names or PURIFIERS)}); it must hold one table of such a name."
        )
    kind, table = PURIFIERS[names[0]], plain.pop(names[0])
    arguments = kind.arguments()
    made_of = {name: _network_settings(plain.pop(name), file, name)
               for name in arguments if name in plain}  # fmt: skip
    numbers = _numbers(kind, table, file, names[0])
    missing = [name for name in kind.needed() if name not in numbers | made_of]
    if missing:
        raise UsageError(f"{file}: the purifier {names[0]} lacks {', '.join(missing)}.")
    return PurifierSettings(names[0], numbers, made_of)


def _numbers(kind: type[Purifier], table: Any, file: Path, name: str) -> dict[str, Any]:
    """Check a purifier's table against its constructor's arguments."""
    fields = [(n, hint, field(default=None)) for n, hint in kind.arguments().items()]
    shape = dataclasses.make_dataclass(kind.__name__, fields, frozen=True, kw_only=True)
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name}: it must be a table, not {table!r}.")
    built: Any = from_plain(shape, table, str(file), (name,))
    return {key: getattr(built, key) for key in table}


def _network_settings(table: dict[str, Any], file: Path, place: str) -> tuple[str, Any]:
    """Return a network's name in `PARTS` and its settings."""
    name = table.get("kind", USUAL)
    if name not in PARTS:
        names = ", ".join(PARTS)
        raise UsageError(f"{file}: {place}: unknown kind {name!r}; choose one of {names}.")
    plain = {k: v for k, v in table.items() if k != "kind"}
    return name, from_plain(PARTS[name].settings, plain, str(file), (place,))


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
    alone = not (folder / DEFENSE).is_file() and (folder / RECIPE).is_file()
    return [RECIPE if alone else DEFENSE, *sorted(p.name for p in folder.glob("*.safetensors"))]


def save_defense(
    defense: PurifiedClassifier, folder: str | Path, *, description: str = "", data: str = ""
) -> Path:
    """Write a defense of known parts to a folder that `load_defense` reads.

    Raises:
        UsageError: a classifier, purifier or network of one whose shape cannot be written down, or
            a folder that cannot be written.
    """
    plain = {"description": description, "data": data} | _plain(defense)
    path = writable_folder(folder)
    for name, classifier in _classifiers(defense).items():
        network, scale = bare_network(classifier), _scale(classifier)
        save_tensors(path / name, network.state_dict(), about(network, data=data, **scale))
    return _finish(path, plain, defense.purifier)


def save_purifier(
    purifier: Purifier, folder: str | Path, *, description: str = "", data: str = ""
) -> Path:
    """Write a purifier alone to a folder that `load_purifier` reads; as `save_defense`."""
    plain = {"description": description, "data": data} | _purifier_tables(purifier)
    return _finish(writable_folder(folder), plain, purifier)


def _finish(path: Path, plain: dict[str, Any], purifier: Purifier) -> Path:
    """Write a purifier's weights, the settings of all, and their sums."""
    for name, network in purifier.networks.items():
        file = path / f"{name}.safetensors"
        save_tensors(file, network.state_dict(), about(network, data=plain["data"]))
    own = own_state(purifier)
    if own:
        save_tensors(path / PURIFIER, own)
    write_text(path / DEFENSE, tomli_w.dumps(plain))
    write_sums(path)
    return path


def _plain(defense: PurifiedClassifier) -> dict[str, Any]:
    """Return a defense's settings as its folder has them."""
    plain: dict[str, Any] = {
        "replicates": defense.replicates,
        "average": defense.average,
        "classifier": dataclasses.asdict(_classifier_settings(defense.classifier)),
    }
    if defense.undefended is not defense.classifier:
        plain["undefended"] = dataclasses.asdict(_classifier_settings(defense.undefended))
    return plain | _purifier_tables(defense.purifier)


def _purifier_tables(purifier: Purifier) -> dict[str, Any]:
    name = name_of(purifier)
    left_out = {k for k in purifier.arguments() if getattr(purifier, k, k) is None}
    unsaid = {*purifier.arguments()} - {*purifier.numbers, *purifier.networks, *left_out}
    if name is None or unsaid:
        raise UsageError(
            f"a {type(purifier).__name__} cannot be saved: {', '.join(PURIFIERS)} can, made of "
            "numbers and networks; give yours a name in PURIFIERS, or save it by your own code."
        )
    networks = {k: _network_table(net, purifier) for k, net in purifier.networks.items()}
    return {name: purifier.numbers} | networks


def _network_table(network: nn.Module, purifier: Purifier) -> dict[str, Any]:
    name = part_name(network)
    if name is None:
        raise UsageError(
            f"only {', '.join(PARTS)} of a {type(purifier).__name__} can be saved, not "
            f"{type(network).__name__}; save a network of your own by your own code."
        )
    settings: Any = network.settings
    kind = {} if name == USUAL else {"kind": name}
    return kind | dataclasses.asdict(settings)


def _classifiers(defense: PurifiedClassifier) -> dict[str, nn.Module]:
    """Return the classifiers that a folder keeps, by file."""
    own = {CLASSIFIER: defense.classifier}
    separate = defense.undefended is not defense.classifier
    return own | ({UNDEFENDED: defense.undefended} if separate else {})


def own_state(purifier: Purifier) -> dict[str, Tensor]:
    """Return the weights and buffers of a purifier that are none of its networks'."""
    inside = tuple(f"{name}." for name in purifier.networks)
    return {k: v for k, v in purifier.state_dict().items() if not k.startswith(inside)}


def bare_network(classifier: nn.Module) -> nn.Module:
    """Return a classifier's network without the normalisation in front of it."""
    return classifier.classifier if isinstance(classifier, Normalized) else classifier


def _scale(classifier: nn.Module) -> dict[str, float]:
    settings = _classifier_settings(classifier)
    return {"mean": settings.mean, "std": settings.std}


def _classifier_settings(classifier: nn.Module) -> ClassifierSettings:
    network = bare_network(classifier)
    simple = isinstance(classifier, Normalized) and classifier.mean.numel() == 1
    if not isinstance(network, tuple(NETWORKS.values())) or not simple:
        names = ", ".join(kind.__name__ for kind in NETWORKS.values())
        raise UsageError(
            f"only a {names} behind normalized(…, mean, std) with one mean and std can be saved, "
            f"not {type(network).__name__}; save a classifier of your own by your own code."
        )
    assert isinstance(classifier, Normalized)
    assert isinstance(network, Network)
    return ClassifierSettings(
        network=network.settings, mean=float(classifier.mean), std=float(classifier.std)
    )
