"""Defenses on disk are verified, come back the same, and say what is wrong with them."""

from __future__ import annotations

import re
import shutil
import tomllib

import pytest
import tomli_w
import torch
from torch import nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings, normalized
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.errors import UsageError
from ebm_defense.langevin import LangevinSettings
from ebm_defense.networks import ZooWideResNet, ZooWideResNetSettings
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.baselines import GaussianNoise
from ebm_defense.purifiers.langevin import LangevinPurifier
from ebm_defense.storage.files import save_tensors
from ebm_defense.storage.folders import (
    DefenseSettings,
    find_folder,
    read_settings,
    save_defense,
    shipped,
    shipped_folder,
    verify,
    write_sums,
)
from ebm_defense.storage.layouts import import_weights
from ebm_defense.storage.state_dicts import load_into
from ebm_defense.storage.weights import (
    load_defense,
    load_energy,
    load_purifier,
)

HILL = "ebm-defense-cifar10"
FILES = ("classifier.safetensors", "energy.safetensors")


def assert_one_sentence(error, *culprits: str) -> None:
    """One line, one sentence, that names what is wrong."""
    text = str(error.value)
    for culprit in culprits:
        assert culprit in text
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", text)


def network(seed: int = 0, widen: int = 1) -> WideResNet:
    torch.manual_seed(seed)
    found = WideResNet(WideResNetSettings(channels=1, classes=3, depth=10, widen=widen))
    randomise_norms(found.state_dict())
    return found


def randomise_norms(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.uniform_(-0.2, 0.2)
        if name.endswith("running_var"):
            value.uniform_(0.2, 1.0)


def energy(seed: int = 0) -> ConvEnergy:
    torch.manual_seed(seed)
    shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation="soft_lrelu")
    return ConvEnergy(shape)


def small_defense(purifier=None, **options) -> PurifiedClassifier:
    if purifier is None:
        purifier = LangevinPurifier(
            energy(), steps=4, step_size=0.1, temperature=0.02, precision="fp32"
        )
    options = {"replicates": 3, "average": "softmax", "seed": 5} | options
    return PurifiedClassifier(normalized(network(), 0.25, 0.5), purifier, **options)


def images(count: int = 2, channels: int = 1, size: int = 8) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    return save_defense(small_defense(), tmp_path / "defense", description="tiny", data="digits")


def edit_settings(folder, **changes) -> None:
    """Change defense.toml, and vouch for it again."""
    plain = tomllib.loads((folder / "defense.toml").read_text())
    (folder / "defense.toml").write_text(tomli_w.dumps(plain | changes))
    write_sums(folder)


# Round trips


def test_a_saved_defense_comes_back_with_identical_logits(folder):
    loaded = load_defense(folder, seed=5, precision="fp32").double()
    expected = small_defense().double()(images().double())
    torch.testing.assert_close(loaded(images().double()), expected, rtol=0, atol=1e-12)
    unpurified = load_defense(folder, seed=5, steps=0).double()
    assert not torch.allclose(unpurified(images().double()), expected, atol=1e-3)


def test_loading_twice_gives_exactly_the_same_logits(folder):
    a, b = (load_defense(folder, seed=5)(images()) for _ in range(2))
    assert torch.equal(a, b)


def test_saving_what_was_loaded_writes_the_same_files(folder, tmp_path):
    again = save_defense(
        load_defense(folder), tmp_path / "again", description="tiny", data="digits"
    )
    assert (again / "SHA256SUMS").read_text() == (folder / "SHA256SUMS").read_text()


def test_settings_and_weights_come_back(folder):
    settings, loaded = read_settings(folder), load_defense(folder)
    assert (settings.description, settings.data) == ("tiny", "digits")
    assert (loaded.replicates, loaded.average) == (3, "softmax")
    assert loaded.purifier.settings == LangevinSettings(steps=4, step_size=0.1, temperature=0.02)
    assert loaded.purifier.energy.settings == energy().settings
    assert loaded.classifier.classifier.settings == network().settings
    assert (float(loaded.classifier.mean), float(loaded.classifier.std)) == (0.25, 0.5)
    for found, wanted in (
        (loaded.classifier.classifier, network()),
        (loaded.purifier.energy, energy()),
    ):
        state = found.state_dict()
        assert all(torch.equal(state[k], v) for k, v in wanted.state_dict().items())


def test_the_folder_holds_what_it_says_and_nothing_half_written(folder):
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["SHA256SUMS", "classifier.safetensors", "defense.toml", "energy.safetensors"]


def test_a_defense_saves_itself(tmp_path):
    path = small_defense().save(tmp_path / "mine")
    assert load_defense(path).replicates == 3


def test_options_override_what_was_saved(folder):
    loaded = load_defense(
        folder, steps=9, precision="bf16", replicates=7, average="votes", max_chains=2, seed=8
    )
    assert loaded.purifier.settings == LangevinSettings(steps=9, step_size=0.1, temperature=0.02)
    assert (loaded.purifier.precision, loaded.replicates, loaded.average) == ("bf16", 7, "votes")
    assert (loaded.max_chains, loaded.seed) == (2, 8)


def test_options_that_are_none_keep_what_was_saved(folder):
    chain = load_defense(folder, steps=None, precision=None).purifier
    assert chain.settings == LangevinSettings(steps=4, step_size=0.1, temperature=0.02)
    assert chain.precision == "auto"


def test_a_loaded_defense_is_ready_to_attack(folder):
    loaded = load_defense(folder)
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.purifier.energy.parameters())
    x = images().requires_grad_()
    assert float(torch.autograd.grad(loaded(x).sum(), x)[0].abs().sum()) > 0


def test_a_separate_undefended_classifier_comes_back(tmp_path):
    undefended = normalized(network(seed=9, widen=2), 0.5, 0.25).eval()  # a shape of its own
    path = save_defense(small_defense(undefended=undefended), tmp_path / "d")
    loaded = load_defense(path)
    torch.testing.assert_close(loaded.undefended(images()), undefended(images()))
    assert not torch.allclose(loaded.classifier(images()), undefended(images()))


def test_without_a_separate_one_the_undefended_classifier_is_the_classifier(folder):
    loaded = load_defense(folder)
    assert loaded.undefended is loaded.classifier


def test_gaussian_noise_comes_back(tmp_path):
    path = save_defense(small_defense(GaussianNoise(0.125)), tmp_path / "d")
    assert load_purifier(path).std == 0.125
    expected = small_defense(GaussianNoise(0.125))(images())
    torch.testing.assert_close(load_defense(path, seed=5)(images()), expected)


def test_purifier_and_energy_load_alone(folder):
    purifier = load_purifier(folder, steps=2, precision="fp32")
    assert purifier.chain_steps == 2
    assert purifier(images()).shape == (2, 1, 8, 8)
    x = 2 * images() - 1
    torch.testing.assert_close(load_energy(folder)(x), energy()(x))


def test_every_shipped_defense_is_what_its_sums_say():
    for name, settings in shipped():
        verify(shipped_folder() / name)
        assert settings.description, name


# Refusals


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(UsageError) as error:
        load_defense(tmp_path / "nowhere")
    assert_one_sentence(error, "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    for load in (load_defense, load_purifier, load_energy):
        with pytest.raises(UsageError, match="SHA-256 differs") as error:
            load(folder)
        assert_one_sentence(error, name)


def test_changed_settings_are_refused(folder):
    with (folder / "defense.toml").open("a") as file:
        file.write("\n")
    with pytest.raises(UsageError, match="SHA-256 differs") as error:
        load_defense(folder)
    assert_one_sentence(error, "defense.toml")


@pytest.mark.parametrize("name", [*FILES, "SHA256SUMS"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(UsageError, match="is missing") as error:
        load_defense(folder)
    assert_one_sentence(error, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_sums_do_not_list_is_refused(folder, name):
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))
    with pytest.raises(UsageError) as error:
        load_defense(folder)
    assert_one_sentence(error, name)


def test_empty_sums_vouch_for_nothing(folder):
    (folder / "SHA256SUMS").write_text("")
    with pytest.raises(UsageError):
        load_defense(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("vouched", [False, True])
def test_truncated_weights_are_refused(folder, name, vouched):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    if vouched:
        write_sums(folder)
    with pytest.raises(UsageError, match="truncated" if vouched else "SHA-256") as error:
        load_defense(folder)
    assert_one_sentence(error, name)


def test_weights_of_a_wider_network_are_refused(folder):
    save_tensors(folder / "classifier.safetensors", network(widen=2).state_dict())
    write_sums(folder)
    with pytest.raises(UsageError) as error:
        load_defense(folder)
    assert_one_sentence(error, "classifier.safetensors", "another architecture")


def test_weights_for_more_classes_are_refused(folder):
    other = network().state_dict() | {"linear.bias": torch.zeros(4)}
    save_tensors(folder / "classifier.safetensors", other)
    write_sums(folder)
    with pytest.raises(UsageError, match=r"linear\.bias has shape \(4,\), not \(3,\)") as error:
        load_defense(folder)
    assert_one_sentence(error, "classifier.safetensors", "another architecture")


def test_weights_of_a_shallower_network_are_refused(folder):
    shape = {"channels": 1, "classes": 3, "depth": 16, "widen": 1}
    edit_settings(folder, classifier={"network": shape, "mean": 0.25, "std": 0.5})
    with pytest.raises(UsageError, match="was made for depth 10, not 16") as error:
        load_defense(folder)
    assert_one_sentence(error, "classifier.safetensors", "another architecture")


def test_weights_that_the_network_has_not_are_refused(folder):
    save_tensors(folder / "energy.safetensors", energy().state_dict() | {"g.0": torch.ones(1)})
    write_sums(folder)
    with pytest.raises(UsageError, match=r"holds g\.0") as error:
        load_defense(folder)
    assert_one_sentence(error, "energy.safetensors", "another architecture")


def test_the_first_key_that_is_missing_is_the_one_named():
    with pytest.raises(UsageError, match="holds no state_dict"):
        load_into(energy(), {}, "w")
    with pytest.raises(UsageError, match=r"lacks f\.0\.weight and holds g\.0"):
        load_into(energy(), {"g.0": torch.ones(1)}, "w")
    two_more = energy().state_dict() | {f"g.{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(UsageError, match=r"holds g\.0"):
        load_into(energy(), two_more, "w")


def test_a_refused_state_changes_no_weight():
    module, state = energy(seed=0), energy(seed=1).state_dict()
    state["f.8.bias"] = torch.ones(2)
    with pytest.raises(UsageError, match=re.escape("f.8.bias has shape (2,), not (1,)")):
        load_into(module, state, "w")
    assert all(torch.equal(module.state_dict()[k], v) for k, v in energy().state_dict().items())


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"replicate": 4}, "replicate: unknown key"),
        ({"energy": {"channels": 1, "widht": 2}}, "energy.widht: unknown key"),
        ({"classifier": {"network": {"deep": 1}}}, "classifier.network.deep: unknown key"),
        ({"langevin": {"steps": 1, "eps": 0.1}}, "langevin.eps: unknown key"),
    ],
)
def test_unknown_settings_are_refused_by_their_path(folder, changes, path):
    edit_settings(folder, **changes)
    with pytest.raises(UsageError, match="unknown key") as error:
        load_defense(folder)
    assert_one_sentence(error, "defense.toml", path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replicates": "many"}, "replicates"),
        ({"classifier": {"network": {"depth": 11}}}, "depth"),
        ({"langevin": {"steps": -1}}, "steps"),
        ({"energy": {"activation": "swish"}}, "activation"),
        ({"classifier": 3}, "classifier"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(folder, changes, words):
    edit_settings(folder, **changes)
    with pytest.raises(UsageError, match=words) as error:
        load_defense(folder)
    assert "defense.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_are_no_toml_are_refused(folder):
    (folder / "defense.toml").write_text("replicates = = 3")
    write_sums(folder)
    with pytest.raises(UsageError, match="cannot be read") as error:
        load_defense(folder)
    assert "defense.toml" in str(error.value)


def test_settings_without_any_purifier_are_refused(folder):
    plain = tomllib.loads((folder / "defense.toml").read_text())
    del plain["langevin"]
    (folder / "defense.toml").write_text(tomli_w.dumps(plain))
    write_sums(folder)
    with pytest.raises(UsageError, match="no purifier") as error:
        load_defense(folder)
    assert_one_sentence(error, "defense.toml")


def test_a_noise_defense_has_no_energy_and_no_steps(tmp_path):
    path = save_defense(small_defense(GaussianNoise(0.1)), tmp_path / "d")
    with pytest.raises(UsageError, match="no energy"):
        load_energy(path)
    with pytest.raises(UsageError, match="no steps"):
        load_defense(path, steps=3)


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: small_defense(lambda x: x), "ForeignPurifier"),
        (
            lambda: small_defense(
                LangevinPurifier(QuadraticEnergy(torch.zeros(1, 8, 8), torch.ones(64)))
            ),
            "LangevinPurifier",
        ),
        (lambda: PurifiedClassifier(nn.Flatten(), GaussianNoise(0.1)), "Flatten"),
        (lambda: PurifiedClassifier(network(), GaussianNoise(0.1)), "WideResNet"),
        (
            lambda: PurifiedClassifier(normalized(network(), (0.5,) * 3, 0.5), GaussianNoise(0.1)),
            "normalized",
        ),
    ],
    ids=["foreign", "energy", "network", "bare", "mean a channel"],
)
def test_what_cannot_be_written_down_is_refused_before_a_file_is_written(tmp_path, make, culprit):
    with pytest.raises(UsageError) as error:
        save_defense(make(), tmp_path / "d")
    assert_one_sentence(error, culprit)
    assert not (tmp_path / "d").exists()


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        save_defense(small_defense(), tmp_path / "file")


def test_defaults_of_the_settings_are_the_published_system():
    settings = DefenseSettings()
    assert settings.classifier.network == WideResNetSettings(depth=28, widen=10)
    assert (settings.classifier.mean, settings.classifier.std) == (0.5, 0.5)


def test_a_folder_goes_by_its_path_and_its_home(folder, monkeypatch):
    assert find_folder(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_folder("~/defense") == folder


# The published release


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two state_dicts of exactly the published layout, and the folder made of them."""
    root = tmp_path_factory.mktemp("published")
    torch.manual_seed(3)
    ebm = {k: 3 * v for k, v in ConvEnergy().state_dict().items()}  # a slope that shows
    clf = WideResNet().state_dict()
    randomise_norms(clf)
    torch.save(ebm, root / "ebm.pth")
    torch.save(clf, root / "clf.pth")
    yield root, import_weights(HILL, root / "ebm.pth", root / "clf.pth", root / "imported")
    shutil.rmtree(root)  # pytest keeps three runs, which would be a gigabyte


def test_the_published_files_make_a_defense_that_classifies(published):
    root, imported = published
    loaded = load_defense(imported, steps=1, replicates=2, seed=3, precision="fp32")
    x, keys = images(1, 3, 32), chain_keys(3, "call 1", range(1), range(2))[:, 0]
    with torch.no_grad():
        logits = loaded(x)

    ebm, clf = ConvEnergy(), WideResNet().eval()
    ebm.load_state_dict(torch.load(root / "ebm.pth"))
    clf.load_state_dict(torch.load(root / "clf.pth"))
    start = (2 * x - 1).repeat(2, 1, 1, 1).requires_grad_()
    (slope,) = torch.autograd.grad(ebm(start).sum(), start)
    with torch.no_grad():
        expected = clf(start - slope + 0.01 * KeyedNoise(keys).normal(0, start)).mean(0)
    assert float(slope.abs().max()) > 0.01
    assert logits.shape == (1, 10)
    assert not torch.allclose(expected, clf(torch.zeros(1, 3, 32, 32))[0], atol=1e-2)
    torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_the_published_defense_has_the_published_settings(published):
    settings = read_settings(published[1])
    chain = {"steps": 1500, "step_size": 0.01, "temperature": 5e-5, "adjusted": False}
    assert settings.purifier == (
        "langevin",
        chain,
        {"energy": ("ConvEnergy", ConvEnergySettings())},
    )
    assert (settings.replicates, settings.average, settings.data) == (15, "logits", "cifar10")


def test_published_files_in_each_others_place_are_refused(published, tmp_path):
    root, _ = published
    with pytest.raises(UsageError) as error:
        import_weights(HILL, root / "clf.pth", root / "clf.pth", tmp_path / "d")
    assert_one_sentence(error, "clf.pth", "lacks f.0.weight", "another architecture")
    assert not (tmp_path / "d").exists()


def test_a_published_file_that_is_absent_is_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist") as error:
        import_weights(HILL, tmp_path / "ebm.pth", tmp_path / "clf.pth", tmp_path / "d")
    assert_one_sentence(error, "ebm.pth")


# A model zoo's classifier


def zoo_weights(depth=10, widen=1) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = ZooWideResNet(ZooWideResNetSettings(depth=depth, widen=widen)).state_dict()
    randomise_norms(state)
    return state


def plain_zoo_logits(state, x: torch.Tensor) -> torch.Tensor:
    """Zagoruyko and Komodakis' network by its definition, from the weights alone."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for block in ("block1.layer.0", "block2.layer.0", "block3.layer.0"):
        stride = 1 if "block1" in block else 2
        active = F.relu(norm(x, f"{block}.bn1"))
        out = F.conv2d(active, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(F.relu(norm(out, f"{block}.bn2")), state[f"{block}.conv2.weight"], padding=1)
        short = state.get(f"{block}.convShortcut.weight")
        x = out + (x if short is None else F.conv2d(active, short, stride=stride))
    pooled = F.relu(norm(x, "bn1")).mean((2, 3))
    return pooled @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("widen", [1, 2])
def test_a_zoos_wide_resnet_is_the_network_of_its_definition(widen):
    state, x = zoo_weights(widen=widen), torch.rand(2, 3, 32, 32)
    network = ZooWideResNet(ZooWideResNetSettings.of(state, "w")).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain_zoo_logits(state, x), rtol=1e-4, atol=1e-5)


def test_a_zoos_checkpoint_and_the_published_energy_become_a_defense(tmp_path):
    torch.manual_seed(3)
    torch.save(ConvEnergy().state_dict(), tmp_path / "ebm.pth")
    wrapped = {f"module.{k}": v for k, v in zoo_weights().items()}
    torch.save({"state_dict": wrapped, "epoch": 100}, tmp_path / "Standard.pt")
    folder = import_weights(
        "robustbench", tmp_path / "ebm.pth", tmp_path / "Standard.pt", tmp_path / "d"
    )
    settings = read_settings(folder)
    assert settings.classifier.network == ZooWideResNetSettings(depth=10, widen=1)
    assert settings.data == "cifar10"
    x = images(2, 3, 32)
    loaded = load_defense(folder, steps=0, replicates=1)
    with torch.no_grad():
        expected = plain_zoo_logits(zoo_weights(), x)
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-5)
    assert load_defense(folder).purifier.chain_steps == 1500


def test_what_is_no_zoos_wide_resnet_is_named(tmp_path):
    torch.save(ConvEnergy().state_dict(), tmp_path / "ebm.pth")
    with pytest.raises(UsageError, match=r"holds no key that begins with block1\.layer") as error:
        import_weights("robustbench", tmp_path / "ebm.pth", tmp_path / "ebm.pth", tmp_path / "d")
    assert_one_sentence(error, "ebm.pth")
