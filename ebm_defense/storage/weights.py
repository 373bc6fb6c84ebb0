"""Defenses read from their folders, and weights into their networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ebm_defense.classifiers import normalized
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import channels_last
from ebm_defense.energies.registry import ENERGIES, Network
from ebm_defense.errors import UsageError
from ebm_defense.networks import make_network
from ebm_defense.purifiers.base import Purifier
from ebm_defense.purifiers.parts import PARTS
from ebm_defense.purifiers.registry import PURIFIERS
from ebm_defense.storage.files import load_tensors
from ebm_defense.storage.folders import (
    CLASSIFIER,
    DEFENSE,
    ENERGY,
    PURIFIER,
    SUMS,
    UNDEFENDED,
    ClassifierSettings,
    PurifierSettings,
    find_folder,
    learned_folder,
    own_state,
    read_settings,
    verify,
)
from ebm_defense.storage.serialize import from_plain
from ebm_defense.storage.state_dicts import load_into, load_weights, read_about

CHAIN_OPTIONS = ("steps", "precision", "adjusted")


def load_defense(name: str | Path = "fashion-mnist", **options: Any) -> PurifiedClassifier:
    """Load a classifier and its purifier together.

    Args:
        name: a shipped name or a folder.
        **options: `steps`, `precision` and `adjusted` of the Langevin purifier (None keeps its
            own); the rest goes to `PurifiedClassifier` (replicates, average, max_chains, seed).

    Raises:
        UsageError: no such defense, or a file that is missing, damaged or not the one hashed.
    """
    folder = find_folder(name)
    verify(folder)
    settings = read_settings(folder)
    if not (folder / CLASSIFIER).is_file() and PURIFIERS[settings.purifier.name].needed():
        raise UsageError(
            f"{folder} holds a purifier alone; name it by --purifier, or by load_purifier, and put "
            "it in front of a classifier."
        )
    bare = settings.undefended
    chain = {k: options.pop(k, None) for k in CHAIN_OPTIONS}
    defaults: dict[str, Any] = {"replicates": settings.replicates, "average": settings.average}
    loaded = PurifiedClassifier(
        _classifier(folder / CLASSIFIER, settings.classifier),
        _purifier(folder, settings.purifier, chain),
        undefended=None if bare is None else _classifier(folder / UNDEFENDED, bare),
        **(defaults | options),
    )
    return loaded.eval()


def load_purifier(name: str | Path = "fashion-mnist", **options: Any) -> Purifier:
    """Load a purifier alone, to put before a classifier of your own.

    Args:
        name: a shipped name or a folder.
        **options: `steps`, `precision` and `adjusted` of a Langevin purifier.

    Raises:
        UsageError: as `load_defense`.
    """
    folder = find_folder(name)
    verify(folder)
    return _purifier(folder, read_settings(folder).purifier, options)


def load_energy(name: str | Path = "fashion-mnist") -> nn.Module:
    """Load an energy alone: `[N, C, H, W]` in [-1, 1] to `[N]`.

    Args:
        name: a shipped name, of a defense or of an energy alone; a folder of either; or
            hf://owner/name[@revision].

    Raises:
        UsageError: as `load_defense`, or a defense without an energy.
    """
    alone = learned_folder(name)
    if alone is not None:
        if (alone / SUMS).is_file():
            verify(alone)
        return network_of(alone / ENERGY, ENERGIES).eval().requires_grad_(False)
    folder = find_folder(name)
    verify(folder)
    networks = read_settings(folder).purifier.networks
    if "energy" not in networks:
        raise UsageError(f"the defense {name} has no energy; its purifier is not an EBM.")
    return _load_network(folder / ENERGY, *networks["energy"])


def _classifier(path: Path, s: ClassifierSettings) -> nn.Module:
    network = make_network(s.network)
    load_weights(network, path)
    return normalized(channels_last(network), s.mean, s.std).eval()


def network_of(path: Path, known: Mapping[str, Network]) -> nn.Module:
    """Load the network that a weight file says it is of.

    Args:
        path: a file of `save_tensors` with what `about` says, such as energy.safetensors.
        known: the networks that it may hold, by name.

    Raises:
        UsageError: a file that does not say, or of another network.
    """
    said = read_about(path)
    name = str(said.get("network"))
    if name not in known:
        raise UsageError(
            f"{path} does not say that it holds one of {', '.join(known)}; give a file that this "
            "package wrote."
        )
    kind = known[name].settings
    own = {f.name for f in fields(kind)}
    settings: Any = from_plain(kind, {k: v for k, v in said.items() if k in own}, str(path))
    network = known[name].make(settings)
    load_weights(network, path)
    return channels_last(network)


def _load_network(path: Path, name: str, settings: Any) -> nn.Module:
    network = PARTS[name].make(settings)
    load_weights(network, path)
    return channels_last(network.eval().requires_grad_(False))


def _purifier(folder: Path, said: PurifierSettings, options: dict[str, Any]) -> Purifier:
    kind = PURIFIERS[said.name]
    given = {k: v for k, v in options.items() if v is not None}
    unknown = [k for k in given if k not in (*kind.arguments(), *kind.options)]
    if unknown:
        raise UsageError(
            f"{folder.name} runs no Langevin chain: its purifier {said.name} has no "
            f"{' or '.join(unknown)} to set."
        )
    networks = {
        name: _load_network(folder / f"{name}.safetensors", *settings)
        for name, settings in said.networks.items()
    }
    try:
        purifier = kind(**(networks | said.numbers | given))
    except UsageError as error:
        raise UsageError(f"{folder / DEFENSE}: {said.name}: {error}") from error
    own = own_state(purifier)
    if own:
        state = purifier.state_dict()
        rest = {k: v for k, v in state.items() if k not in own}
        load_into(purifier, rest | load_tensors(folder / PURIFIER), str(folder / PURIFIER))
    return purifier
