"""Files are whole or not there, and no pickle runs code."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from ebm_defense.errors import UsageError
from ebm_defense.storage.files import (
    atomic,
    load_plain,
    load_tensors,
    save_state,
    save_tensors,
    writable_folder,
    write_text,
)

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}


def assert_one_sentence(error, culprit: str) -> None:
    """One line, one sentence, that names what is wrong."""
    text = str(error.value)
    assert culprit in text
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", text)


# Atomic writes


def test_an_atomic_write_that_succeeds_leaves_the_file_alone(tmp_path):
    with atomic(tmp_path / "x.txt") as partial:
        partial.write_text("new")
        assert not (tmp_path / "x.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "new"


def write_half(path: Path, error: BaseException) -> None:
    with atomic(path) as partial:
        partial.write_text("half")
        raise error


def test_an_atomic_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(tmp_path / "x.txt", RuntimeError("half-way"))
    assert list(tmp_path.iterdir()) == []


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        write_half(tmp_path / "x.txt", KeyboardInterrupt())
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "old"


def test_a_block_that_writes_nothing_fails_and_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "x.txt"):
        pass
    assert (tmp_path / "x.txt").read_text() == "old"


def test_the_temporary_file_keeps_the_suffix_and_the_folder(tmp_path):
    with atomic(tmp_path / "plot.v1.png") as partial:
        assert partial.suffix == ".png"
        assert partial.parent == tmp_path
        partial.touch()


def test_text_is_utf_8_and_replaces_what_was_there(tmp_path):
    write_text(tmp_path / "x.txt", "old")
    write_text(tmp_path / "x.txt", "ε²/2 ≥ 0\n")
    assert (tmp_path / "x.txt").read_bytes() == "ε²/2 ≥ 0\n".encode()


def test_state_that_cannot_be_pickled_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"x": torch.ones(2)})
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        save_state(path, {"x": torch.zeros(2), "bad": lambda: None})
    assert load_plain(path)["x"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


# Folders


def test_a_writable_folder_is_made_with_its_parents(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    assert writable_folder(str(folder)) == folder


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_folder("~/runs") == tmp_path / "runs"


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "x").touch()
    for path in (tmp_path / "x", tmp_path / "x" / "below"):
        with pytest.raises(UsageError, match="cannot be written") as error:
            writable_folder(path)
        assert_one_sentence(error, str(path))


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)  # chmod would not stop a root user
    with pytest.raises(UsageError, match="Permission denied"):
        writable_folder(tmp_path)


# Pickles


class Malicious:
    """Writes a marker file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_pickle(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def test_the_malicious_object_would_have_done_it(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("write", [lambda p, c: torch.save(c, p), write_pickle])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"f.0.weight": torch.ones(2), "x": m}])
@pytest.mark.parametrize("load", [load_plain, load_tensors])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, write, wrap, load):
    marker = tmp_path / "marker"
    write(tmp_path / "evil.pth", wrap(Malicious(marker)))
    with pytest.raises(UsageError) as error:
        load(tmp_path / "evil.pth")
    assert_one_sentence(error, "evil.pth")
    assert not marker.exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UsageError, match="more than plain tensors") as error:
        load_plain(tmp_path / "module.pth")
    assert_one_sentence(error, "module.pth")


@pytest.mark.parametrize("keep", [0, 1, 10, 200, 0.5, 0.95])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "cut.pth"
    save_state(path, TENSORS)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UsageError, match="truncated") as error:
        load_plain(path)
    assert_one_sentence(error, "cut.pth")


@pytest.mark.parametrize("load", [load_plain, load_tensors])
@pytest.mark.parametrize("name", ["none.pth", "none.safetensors"])
def test_a_missing_file_is_named(tmp_path, load, name):
    with pytest.raises(UsageError, match="does not exist") as error:
        load(tmp_path / name)
    assert_one_sentence(error, name)


def test_a_folder_is_no_weight_file(tmp_path):
    (tmp_path / "weights.pth").mkdir()
    with pytest.raises(UsageError):
        load_tensors(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], torch.ones(2), 3.0, {"state_dict": {"w": torch.ones(2)}}, {"epoch": 3}],
    ids=["list", "tensor", "number", "wrapped", "number in dict"],
)
def test_what_is_no_bare_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="bare state_dict") as error:
        load_tensors(tmp_path / "other.pth")
    assert_one_sentence(error, "other.pth")


def test_plain_values_come_back(tmp_path):
    state = {"n": 3, "name": "x", "list": [1.5, None], "t": torch.ones(2), "deep": {"a": (1, 2)}}
    save_state(tmp_path / "s.pt", state)
    found = load_plain(tmp_path / "s.pt")
    assert torch.equal(found.pop("t"), state.pop("t"))
    assert found == state


# Tensors


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_tensors_come_back_bit_for_bit(tmp_path, name):
    path = tmp_path / name
    (save_tensors if path.suffix == ".safetensors" else save_state)(path, TENSORS)
    found = load_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in TENSORS.items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_tensors_of_any_layout_can_be_saved(tmp_path):
    state = {"t": torch.arange(6.0).view(2, 3).T.requires_grad_()}
    save_tensors(tmp_path / "w.safetensors", state)
    assert torch.equal(load_tensors(tmp_path / "w.safetensors")["t"], state["t"])


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_safetensors_are_refused(tmp_path, keep):
    path = tmp_path / "cut.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="truncated") as error:
        load_tensors(path)
    assert_one_sentence(error, "cut.safetensors")


def test_a_pickle_under_a_safetensors_name_is_refused(tmp_path):
    path = tmp_path / "evil.safetensors"
    write_pickle(path, Malicious(tmp_path / "marker"))
    with pytest.raises(UsageError):
        load_tensors(path)
    assert not (tmp_path / "marker").exists()
