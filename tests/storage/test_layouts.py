"""Published weights become defenses, and what does not fit is refused in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, make_activation
from ebm_defense.energies.residual import ResidualEnergy, ResidualEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.networks import ZooWideResNet, ZooWideResNetSettings, make_network
from ebm_defense.storage.layouts import LAYOUTS, export_weights, import_weights
from ebm_defense.storage.state_dicts import load_into
from ebm_defense.storage.weights import load_defense, load_energy

State = dict[str, Tensor]
ACTIVATIONS = {("mefa", "conv"): "silu"}
"""Those that a layout has to be told."""


def conv(width: int = 2) -> State:
    """Bare f.N keys, as the first release, PureGen and MEFA have them."""
    return ConvEnergy(ConvEnergySettings(width=width)).state_dict()


def residual(width: int = 2) -> State:
    """PureGen's and MEFA's SNGAN keys."""
    return ResidualEnergy(ResidualEnergySettings(width=width)).state_dict()


def hill() -> State:
    return WideResNet(WideResNetSettings(depth=10, widen=1)).state_dict()


def zoo() -> State:
    return ZooWideResNet(ZooWideResNetSettings(depth=10, widen=1)).state_dict()


ENERGIES = {"conv": conv, "residual": residual}
KNOWN = [
    (name, kind)
    for name, layout in LAYOUTS.items()
    for kind, network in (("conv", "ConvEnergy"), ("residual", "ResidualEnergy"))
    if network in layout.activations
]


def imported(
    tmp_path: Path, ebm: object, clf: object, name: str, kind: str = "conv", **options: object
) -> Path:
    torch.save(ebm, tmp_path / "ebm.pth")
    torch.save(clf, tmp_path / "clf.pth")
    told = {"activation": ACTIVATIONS.get((name, kind))} | options
    return import_weights(
        name, tmp_path / "ebm.pth", tmp_path / "clf.pth", tmp_path / "defense", **told
    )


def test_the_published_keys_are_the_networks_own() -> None:
    published = [f"f.{i}.{part}" for i in (0, 2, 4, 6, 8) for part in ("weight", "bias")]
    assert sorted(conv()) == sorted(published)
    layers = {"block1": ("c1", "c2", "c_sc"), "block2": ("c1", "c2", "c_sc")}
    layers |= {"block3": ("c1", "c2"), "block4": ("c1", "c2")}
    published = [
        f"{block}.{layer}.{part}"
        for block, names in layers.items()
        for layer in names
        for part in ("weight", "bias")
    ]
    assert sorted(residual()) == sorted([*published, "l5.weight"])
    assert residual(128)["l5.weight"].shape == (1, 128)


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "model", "net", "ema", "module."])
@pytest.mark.parametrize(("name", "kind"), KNOWN)
def test_a_published_energy_becomes_a_defense_however_it_is_wrapped(
    name: str, kind: str, wrap: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = ENERGIES[kind]()
    prefixed = {f"module.{k}": v for k, v in state.items()}
    content = {"bare": state, "module.": prefixed}.get(wrap, {wrap: prefixed, "epoch": 3})
    energy = load_energy(imported(tmp_path, content, zoo(), name, kind))
    assert all(torch.equal(energy.state_dict()[k], v) for k, v in state.items())
    purifier = load_defense(tmp_path / "defense").purifier
    assert vars(purifier.settings) == vars(LAYOUTS[name].chain)


def faults(state: State) -> dict[str, State]:
    """Return a state_dict with one key missing, one too many, and one of another shape, each."""
    found: dict[str, State] = {"extra": state | {"extra.weight": torch.zeros(3)}}
    for key, value in state.items():
        if "num_batches" in key:
            continue
        found[f"without {key}"] = {k: v for k, v in state.items() if k != key}
        found[f"shape of {key}"] = state | {key: torch.zeros(*[n + 1 for n in value.shape])}
    return found


class Code:
    """What a pickle can run."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this must never be run",)


def refused(message: pytest.ExceptionInfo[UsageError], file: str) -> None:
    text = str(message.value)
    assert file in text
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", text)


@pytest.mark.parametrize(("name", "kind"), KNOWN)
def test_every_key_of_a_published_energy_is_checked(name: str, kind: str, tmp_path: Path) -> None:
    for fault, state in faults(ENERGIES[kind]()).items():
        with pytest.raises(UsageError) as error:
            imported(tmp_path, state, zoo(), name, kind)
        refused(error, "ebm.pth")
        assert not (tmp_path / "defense").exists(), fault


@pytest.mark.parametrize("classifier", [hill, zoo])
def test_every_key_of_a_published_classifier_is_checked(classifier, tmp_path: Path) -> None:
    settings = WideResNetSettings if classifier is hill else ZooWideResNetSettings
    found = faults(classifier())
    for state in found.values():
        with pytest.raises(UsageError) as error:
            load_into(make_network(settings.of(state, "clf.pth")), state, "clf.pth")
        refused(error, "clf.pth")
    for fault in (*list(found)[:5], *list(found)[-5:]):
        with pytest.raises(UsageError) as error:
            imported(tmp_path, conv(), found[fault], "robustbench")
        refused(error, "clf.pth")
        assert not (tmp_path / "defense").exists(), fault


@pytest.mark.parametrize("where", ["ebm", "clf"])
@pytest.mark.parametrize(("name", "kind"), KNOWN)
def test_a_pickle_with_code_is_refused_and_not_run(
    name: str, kind: str, where: str, tmp_path: Path, capsys
) -> None:
    states = {"ebm": ENERGIES[kind](), "clf": zoo()}
    states[where] = states[where] | {"extra": Code()}
    with pytest.raises(UsageError, match="holds more than plain tensors") as error:
        imported(tmp_path, states["ebm"], states["clf"], name, kind)
    refused(error, f"{where}.pth")
    assert "never" not in capsys.readouterr().out


def test_an_activation_that_no_key_tells_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --activation soft_lrelu or silu") as error:
        imported(tmp_path, conv(), zoo(), "mefa", activation=None)
    refused(error, "ebm.pth")
    with pytest.raises(UsageError, match="has no activation 'relu'"):
        imported(tmp_path, conv(), zoo(), "mefa", activation="relu")
    energies = {
        word: load_energy(imported(tmp_path, conv(), zoo(), "mefa", activation=word))
        for word in ("soft_lrelu", "silu")
    }
    assert isinstance(energies["silu"].f[1], nn.SiLU)
    # As MEFA writes it: (1 − a)x + a√(x² + e²) − ae with a = 0.49 and e = 0.01.
    x = torch.linspace(-2, 2, 401).double()
    expected = 0.51 * x + 0.49 * (x * x + 1e-4).sqrt() - 0.49 * 0.01
    torch.testing.assert_close(energies["soft_lrelu"].f[1](x), expected)


def test_an_energy_of_patches_is_refused(tmp_path: Path) -> None:
    patches = ResidualEnergy(ResidualEnergySettings(width=2, channels=12)).state_dict()
    with pytest.raises(UsageError, match="12 channels") as error:
        imported(tmp_path, patches, zoo(), "puregen", "residual")
    refused(error, "ebm.pth")


def test_puregens_network_is_that_of_its_definition(tmp_path: Path) -> None:
    """From the weights alone, as the paper's code computes it; its output is a column."""
    torch.manual_seed(0)
    s, x = residual(), torch.rand(2, 3, 32, 32) * 2 - 1

    def layer(x: Tensor, name: str, padding: int) -> Tensor:
        return F.conv2d(x, s[f"{name}.weight"], s[f"{name}.bias"], padding=padding)

    inner = layer(F.relu(layer(x, "block1.c1", 1)), "block1.c2", 1)
    h = F.avg_pool2d(inner, 2) + layer(F.avg_pool2d(x, 2), "block1.c_sc", 0)
    for block in ("block2", "block3", "block4"):
        inner = layer(F.relu(layer(F.relu(h), f"{block}.c1", 1)), f"{block}.c2", 1)
        halves = f"{block}.c_sc.weight" in s
        short = layer(h, f"{block}.c_sc", 0) if halves else h
        h = F.avg_pool2d(inner, 2) + F.avg_pool2d(short, 2) if halves else inner + short
    column = F.relu(h).mean((2, 3)) @ s["l5.weight"].T
    energy = load_energy(imported(tmp_path, s, zoo(), "puregen", "residual"))
    torch.testing.assert_close(energy(x), column[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classifier", [hill, zoo])
@pytest.mark.parametrize("scale", [{}, {"mean": 0.25, "std": 0.5}])
def test_a_classifiers_scale_is_its_layouts_custom(classifier, scale, tmp_path: Path) -> None:
    defense = load_defense(imported(tmp_path, conv(), classifier(), "robustbench", **scale))
    custom = {"mean": 0.5, "std": 0.5} if classifier is hill else {"mean": 0.0, "std": 1.0}
    assert {k: float(getattr(defense.classifier, k)) for k in ("mean", "std")} == custom | scale


def test_what_is_exported_is_imported_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = load_defense(imported(tmp_path, conv(), hill(), "ebm-defense-cifar10"))
    files = export_weights(first, tmp_path / "files")
    assert {k: v.name for k, v in files.items()} == {"clf": "clf.pth", "ebm": "ebm.pth"}
    bare = torch.load(files["ebm"], weights_only=True)
    assert sorted(bare) == sorted(conv())
    again = import_weights("ebm-defense-cifar10", files["ebm"], files["clf"], tmp_path / "again")
    for name in ("energy.safetensors", "classifier.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / "defense" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "slope", "width"),
    [
        ("soft_lrelu", 0.05, 0.01),
        ("soft_lrelu:0.3", 0.05, 0.3),
        ("soft_lrelu:0.01:0.02", 0.02, 0.01),
    ],
)
def test_smooth_activations_have_any_width_and_slope_in_every_network(name, slope, width) -> None:
    energies = [
        ConvEnergy(ConvEnergySettings(width=2, activation=name)),
        ResidualEnergy(ResidualEnergySettings(width=2, activation=name)),
    ]
    for energy in energies:
        assert any(
            (getattr(m, "slope", None), getattr(m, "width", None)) == (slope, width)
            for m in energy.modules()
        )


@pytest.mark.parametrize(
    "name", ["soft_lrelu:0", "soft_lrelu:1:1", "soft_lrelu:1:2:3", "soft_lrelu:x"]
)
def test_an_activation_out_of_range_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="activation is"):
        make_activation(name)
