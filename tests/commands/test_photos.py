"""Commands take folders of photos, and networks of one's own, as people have them."""

from __future__ import annotations

import tomllib
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_defense.commands.main import COMMANDS
from ebm_defense.commands.options.factories import factory, make_module, scaled_classifier
from ebm_defense.commands.options.photos import Photos, Wanted, wanted_by
from ebm_defense.energies.conv import ConvEnergy
from ebm_defense.errors import UsageError
from ebm_defense.networks import ZooWideResNet, ZooWideResNetSettings
from ebm_defense.purifiers.registry import baseline
from ebm_defense.storage.weights import load_defense

NO_PHOTOS = ("Assemble", "Bench", "Doctor")
"""They read no images."""
QUICK = ("--images", 4, "--steps", 1, "--replicates", 1, "--judge-replicates", 2)


def write_tree(root: Path, size: int = 10, each: int = 12) -> Path:
    """Write grey digits' worth of class folders, "0" to "9", of square images."""
    rng = np.random.default_rng(0)
    for name in range(10):
        (root / str(name)).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 255, (size, size), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(name) / f"{i}.png")
    return root


def test_a_grey_defense_evaluates_a_folder_of_photos(run, tiny_defense, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    words = ("evaluate", "--defense", tiny_defense, "--data", "folder", "--data-root", root)
    out = tmp_path / "run"
    assert run(*words, *QUICK, "--crop", 8, "--out", out)[0] == 0
    kept = tomllib.loads((out / "command.toml").read_text())
    assert kept["photos"]["crop"] == 8
    status, _, err = run(*words, *QUICK, "--crop", 9, "--out", tmp_path / "other")
    assert status == 2
    assert "--crop 8" in err
    again = tmp_path / "again"
    assert run("evaluate", "--config", out / "command.toml", "--out", again)[0] == 0
    one, other = ((f / "records.csv").read_bytes() for f in (out, again))
    assert one == other


OTHERS = {
    "corruptions": ("--corruption", "fog", "--severity", 1),
    "signal": ("--replicates", 1),
    "rank-attacks": ("--only", "magic"),
    "audit": (),
    "train-advgan": ("--updates", 1, "--batch", 2, "--width", 4),
}


@pytest.mark.parametrize("command", OTHERS)
def test_commands_that_read_data_read_folders_alike(run, tiny_defense, tmp_path, command) -> None:
    root = write_tree(tmp_path / "tree", each=1)
    defense = (tiny_defense,) if command == "audit" else ("--defense", tiny_defense)
    where = ("--data", "folder", "--data-root", root, "--crop", 9)
    out = () if command == "signal" else ("--out", tmp_path / "out")
    status, _, err = run(command, *defense, *where, *OTHERS[command], *out)
    assert status == 2
    assert "give --crop 8, not 9" in err  # what the folder's options, and no others, say


def test_corruptions_of_a_folder_of_photos(run, tiny_defense, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", each=1)
    words = ("--data", "folder", "--data-root", root, "--crop", 8, "--images", 4)
    status, printed, _ = run(
        "corruptions", "--defense", tiny_defense, *words, *OTHERS["corruptions"],
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert status == 0
    assert "fog" in printed


def test_every_command_that_names_a_data_set_takes_the_options_of_folders() -> None:
    for entry in COMMANDS.values():
        command = getattr(import_module(f"ebm_defense.commands.{entry.module}"), entry.cls)
        if not is_dataclass(command):
            continue
        names = {field.name: field.type for field in fields(command)}
        if "data_root" in names and command.__name__ not in NO_PHOTOS:
            assert names.get("photos") == "Photos", command


def test_photo_options_of_another_data_set_are_refused(run, tiny_defense) -> None:
    words = ("evaluate", "--defense", tiny_defense, "--data", "digits", "--crop", 8)
    status, _, err = run(*words)
    assert status == 2
    assert "data set folder" in err


def test_training_takes_folders(run, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", each=4)
    where = ("--data", "folder", "--data-root", root, "--crop", 8, "--channels", 1)
    small = ("--width", 2, "--bank", 8, "--batch", 4, "--langevin-steps", 1, "--updates", 1)
    energy = ("train-ebm", *where, *small, "--chain-lengths", 1, "--out", tmp_path / "e")
    assert "--test-share" in run(*energy)[2]
    assert run(*energy, "--test-share", 0.2)[0] == 0
    changed = run(*energy, "--test-share", 0.5, "--resume")
    assert changed[0] == 2
    assert "--photos" in changed[2]
    classifier = ("train-classifier", *where, "--test-share", 0.2, "--widen", 1, "--batch", 8)
    assert run(*classifier, "--epochs", 1, "--out", tmp_path / "c")[0] == 0


def test_an_energy_needs_no_classes(run, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(8):
        Image.new("L", (9, 9), 20 * i).save(root / f"{i}.png")
    words = (
        *("train-ebm", "--data", "folder", "--data-root", root, "--crop", 8, "--channels", 1),
        *("--test-share", 0, "--width", 2, "--bank", 4, "--batch", 2, "--langevin-steps", 1),
        *("--updates", 1, "--chain-lengths", 1, "--out", tmp_path / "e"),
    )
    assert run(*words)[0] == 0


def test_a_defense_says_what_images_it_wants(tiny_defense) -> None:
    assert wanted_by(load_defense(tiny_defense)) == Wanted(1, 8)
    assert wanted_by(baseline("jpeg:75")) == Wanted(None, None)
    with pytest.raises(UsageError, match="takes 8x8 images"):
        Photos(crop=9).open("folder", "test", Path(), Wanted(1, 8))


# Networks of one's own

MODULE = """
import torch
from ebm_defense import normalized

class Net(torch.nn.Module):
    def __init__(self, width=4, deep=False):
        super().__init__()
        self.fc = torch.nn.Linear(192, width)
        self.deep = deep

    def forward(self, x):
        return self.fc(x.flatten(1))

class Told(Net):
    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}

def scaled():
    return normalized(Net(), 0.5, 0.25)

def broken():
    raise RuntimeError("no such file")

class Zoo:
    net = Net
"""


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder with a module of one's own in it, in which the command is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"own_{tmp_path.name}.py").write_text(MODULE)
    return f"own_{tmp_path.name}"


def test_a_module_of_the_current_folder_is_found_and_takes_arguments(here) -> None:
    assert factory(f"{here}:Net")().fc.out_features == 4
    made = factory(f"{here}:Net(width=7, deep=True)")()
    assert (made.fc.out_features, made.deep) == (7, True)
    assert factory(f"{here}:Zoo.net(width=2)")().fc.out_features == 2


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("Net", "must have the form"),
        (":Net", "must have the form"),
        ("nowhere_at_all:Net", "cannot be imported"),
        ("{}:Absent", "cannot be imported"),
        ("{}:MODULE", "cannot be imported"),
        ("{}:Net(width=2", "bracket"),
        ("{}:Net(width=open('x'))", "plain values"),
        ("{}:Net(depth=2)", "failed: TypeError"),
        ("{}:broken", "failed: RuntimeError: no such file"),
    ],
)
def test_factories_that_do_not_work_say_why(here, spec, said) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        factory(spec.format(here))()


def test_weights_and_scale_are_given_beside_a_factory(here, tmp_path) -> None:
    plain = make_module(f"{here}:Net", None, "classifier")
    torch.save({"state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}}, "w.pth")
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for spec in ("Net", "scaled"):
        module = make_module(f"{here}:{spec}", Path("w.pth"), "classifier")
        scale = ((0.5,), (0.25,)) if spec == "Net" else (None, None)
        scaled = scaled_classifier(module, *scale, None)
        assert torch.equal(scaled(x), plain((x - 0.5) / 0.25))
    with pytest.raises(UsageError, match=r"normalized\(…\) already"):
        scaled_classifier(make_module(f"{here}:scaled", None, "classifier"), (0.5,), (0.5,), None)
    with pytest.raises(UsageError, match="together"):
        scaled_classifier(plain, (0.5,), None, None)
    larger = torch.rand(2, 3, 16, 16)
    assert scaled_classifier(plain, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 8)(larger).shape == (2, 4)


def test_a_model_that_tells_its_scale_gets_it(here) -> None:
    told = make_module(f"{here}:Told", None, "classifier")
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(scaled_classifier(told, None, None, None)(x), told((x - mean) / 0.5))


def test_evaluate_takes_a_scale_on_the_command_line(run, here) -> None:
    spec = f"{here}:Net(width=10)"
    root = write_tree(Path("tree"), size=8, each=2)
    words = (
        *("evaluate", "--classifier", spec, "--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.2),
        *("--purifier", "gaussian:0.1", "--data", "folder", "--data-root", root, *QUICK),
    )
    assert run(*words, "--judge-replicates", 16, "--out", "run")[0] == 0


def test_a_zoos_checkpoint_is_imported_and_its_hours_told(run, tmp_path: Path) -> None:
    """One import, one evaluate, and nothing to write."""
    torch.manual_seed(0)
    zoo = ZooWideResNet(ZooWideResNetSettings(depth=10, widen=1)).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in zoo.items()}}, tmp_path / "zoo.pt")
    torch.save(ConvEnergy().state_dict(), tmp_path / "ebm.pth")
    files = ("--ebm", tmp_path / "ebm.pth", "--clf", tmp_path / "zoo.pt", "--out", tmp_path / "d")
    status, printed, _ = run("checkpoints", "import", "robustbench", *files)
    assert status == 0
    assert f"--defense {tmp_path / 'd'} --data cifar10" in printed
    root = tmp_path / "tree"  # CIFAR-10 itself is not here
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / name / "0.png")
    words = ("evaluate", "--defense", tmp_path / "d", "--data", "folder", "--data-root", root)
    status, printed, _ = run(*words, "--images", 2, "--protocol", "hill2021", "--dry-run")
    assert status == 0
    assert " h at " in printed
