"""Weights as papers published them, made into defense folders, and given back in their layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ebm_defense.classifiers import WideResNetSettings, normalized
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import channels_last
from ebm_defense.energies.registry import ENERGIES
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.networks import ZooWideResNetSettings, make_network
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import save_state, writable_folder
from ebm_defense.storage.folders import bare_network, save_defense
from ebm_defense.storage.state_dicts import load_weights, unwrapped_state

CHANNELS, PIXELS, DATA = 3, 32, "cifar10"
"""What all published energies of these layouts were learned on."""

Activations = Mapping[str, str]
"""Activations that published weights may be of, by the word for them, as `make_activation` takes
them."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a paper's energies lie in their files, and how their chains run.

    Attributes:
        source: whose energies they are, for descriptions.
        activations: by the name in `ENERGIES` of a network that was published; keys and shapes do
            not tell an activation, so that one of several is asked for.
        chain: steps, step size and temperature.
        replicates: purifications an image.
    """

    source: str
    activations: Mapping[str, Activations]
    chain: LangevinSettings = field(default_factory=LangevinSettings)
    replicates: int = 15


LEAKY, RELU = {"leaky_relu": "leaky_relu"}, {"relu": "relu"}
SOFT = {"soft_lrelu": "soft_lrelu:0.01:0.02"}
_HILL = Layout(source="Hill, Mitchell, Zhu (2021)", activations={"ConvEnergy": LEAKY})

LAYOUTS: dict[str, Layout] = {
    "ebm-defense-cifar10": _HILL,
    "robustbench": _HILL,
    "puregen": Layout(
        source="PureGen (Bhat et al. 2024)",
        activations={"ResidualEnergy": RELU, "ConvEnergy": LEAKY},
        chain=LangevinSettings(steps=150, step_size=1.25e-2, temperature=1e-4),
    ),
    "mefa": Layout(
        source="MEFA (Du, Hill, Cai 2026)",
        activations={"ConvEnergy": SOFT | {"silu": "silu"}, "ResidualEnergy": SOFT},
        chain=LangevinSettings(steps=1500, step_size=0.01, temperature=1e-4),
        replicates=20,
    ),
}
"""By the names that `checkpoints import` knows. `robustbench` is the energy of the first release
behind which a wide ResNet of that benchmark stands; classifiers are told by their keys."""

MARKS = {"ConvEnergy": "f.0.weight", "ResidualEnergy": "block1.c1.weight"}
"""Keys that tell energies apart."""


class ClassifierLayout(NamedTuple):
    """A published classifier's shape, and the mean and std of the images it takes, in [0, 1]."""

    settings: type[WideResNetSettings] | type[ZooWideResNetSettings]
    mean: float
    std: float


CLASSIFIERS: dict[str, ClassifierLayout] = {
    "block1.layer.": ClassifierLayout(ZooWideResNetSettings, 0.0, 1.0),
    "layer1.": ClassifierLayout(WideResNetSettings, 0.5, 0.5),
}
"""Wide ResNets by what some of their keys begin with: RobustBench's, and that of Hill et al."""


def import_weights(
    name: str,
    ebm: Path,
    clf: Path,
    folder: str | Path,
    *,
    activation: str | None = None,
    mean: float | None = None,
    std: float | None = None,
) -> Path:
    """Turn a published energy and a classifier into a defense folder.

    Args:
        name: in `LAYOUTS`.
        ebm: the energy's weights, bare or in what surrounds them.
        clf: a wide ResNet's of Hill et al. or of RobustBench, likewise, of any depth and width.
        folder: where to write; then `load_defense(folder)`.
        activation: the energy's, where the layout has several.
        mean: of the images that the classifier wants, in [0, 1] units; its layout's custom if not
            given, which is 0.5 for Hill et al. and 0 for RobustBench.
        std: their standard deviation; 0.5 and 1.

    Raises:
        UsageError: an unknown layout or activation, or a file that is missing, damaged, holds code,
            or has other keys or shapes.
    """
    if name not in LAYOUTS:
        raise UsageError(f"unknown weights {name!r} to import; there are {', '.join(LAYOUTS)}.")
    layout = LAYOUTS[name]
    energy = _energy(ebm, name, layout, activation)
    classifier = _classifier(clf, mean, std)
    defense = PurifiedClassifier(
        classifier,
        LangevinPurifier(energy, **_chain(layout)),
        replicates=layout.replicates,
    )
    description = f"{clf.stem} behind the published CIFAR-10 energy of {layout.source}."
    return save_defense(defense, folder, description=description, data=DATA)


def _chain(layout: Layout) -> dict[str, Any]:
    return dict(vars(layout.chain))


def _energy(path: Path, name: str, layout: Layout, activation: str | None) -> nn.Module:
    state = unwrapped_state(path, MARKS.values())
    kinds = [k for k in layout.activations if MARKS[k] in state]
    if not kinds:
        marks = " or ".join(MARKS[k] for k in layout.activations)
        raise UsageError(
            f"{path} lacks {marks}: these are weights of another architecture than {name}."
        )
    chosen = _activation(layout.activations[kinds[0]], activation, path)
    kind = ENERGIES[kinds[0]]
    settings: Any = kind.settings.of(state, str(path), PIXELS, chosen)  # type: ignore[attr-defined]
    if settings.channels != CHANNELS:
        raise UsageError(
            f"{path} holds an energy of {settings.channels} channels, not of colour images' "
            f"{CHANNELS}; energies of patches are not known here."
        )
    energy = kind.make(settings)
    load_weights(energy, path)
    return energy


def _activation(known: Activations, asked: str | None, path: Path) -> str:
    """Return the activation as `make_activation` takes it."""
    if asked is None and len(known) == 1:
        return next(iter(known.values()))
    if asked is None or asked not in known:
        word = "does not say its activation" if asked is None else f"has no activation {asked!r}"
        raise UsageError(f"{path} {word}; give --activation {' or '.join(known)}.")
    return known[asked]


def _classifier(path: Path, mean: float | None, std: float | None) -> nn.Module:
    state = unwrapped_state(path)
    layout = _classifier_layout(state, path)
    network = make_network(layout.settings.of(state, str(path)))
    load_weights(network, path)
    mean, std = layout.mean if mean is None else mean, layout.std if std is None else std
    return normalized(channels_last(network), mean, std)


def _classifier_layout(state: Mapping[str, Tensor], path: Path) -> ClassifierLayout:
    for start, layout in CLASSIFIERS.items():
        if any(key.startswith(start) for key in state):
            return layout
    raise UsageError(
        f"{path} holds no key that begins with {' or '.join(CLASSIFIERS)}: these are weights of "
        "another architecture than the wide ResNets of Hill et al. and of RobustBench."
    )


def export_weights(defense: PurifiedClassifier, folder: str | Path) -> dict[str, Path]:
    """Write a defense's networks as bare state_dicts under the published keys, for other code.

    Args:
        defense: of any purifier; each of its networks becomes a file.
        folder: where to write `ebm.pth`, `clf.pth` and, if it is another one, `undefended.pth`.

    Returns:
        The files by part.
    """
    path = writable_folder(folder)
    parts = {"clf": bare_network(defense.classifier)} | {
        "ebm" if name == "energy" else name: network
        for name, network in defense.purifier.networks.items()
    }
    if defense.undefended is not defense.classifier:
        parts["undefended"] = bare_network(defense.undefended)
    for part, network in parts.items():
        save_state(path / f"{part}.pth", dict(network.state_dict()))
    return {part: path / f"{part}.pth" for part in parts}
