"""Weights are loaded however people wrap them, or the key that does not fit is named."""

from __future__ import annotations

import datetime
import pickle
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import nn

from ebm_defense.classifiers import normalized
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.errors import UsageError
from ebm_defense.storage.files import load_safetensors, save_tensors
from ebm_defense.storage.state_dicts import about, load_weights, read_about

NOW = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.bn1(self.conv1(x)).mean((2, 3)))


class Scaled(nn.Module):
    """A network behind a normalisation of its own, as model zoos have them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
        self.model = Net()

    def forward(self, x):
        return self.model(x - self.mu)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights and statistics of a `Net`, all random."""
    torch.manual_seed(seed)
    state = Net().state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}


def prefixed(prefix: str, state=None) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in (state or weights()).items()}


def written(tmp_path, content, name="w.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def net_of(module: nn.Module) -> Net:
    return next(m for m in module.modules() if isinstance(m, Net))


def assert_loaded(module: nn.Module, state=None) -> None:
    found, expected = net_of(module).state_dict(), state or weights()
    learned = [k for k in expected if not k.endswith("num_batches_tracked")]
    assert all(torch.equal(found[k], expected[k]) for k in learned)


WRAPPED = {
    "as it is": weights,
    "DataParallel": lambda: prefixed("module."),
    "compiled": lambda: prefixed("_orig_mod."),
    "both": lambda: prefixed("module._orig_mod."),
    "both, otherwise": lambda: prefixed("_orig_mod.module."),
    "compiled inside": lambda: {
        k.replace("bn1.", "bn1._orig_mod."): v for k, v in weights().items()
    },
    "Lightning": lambda: prefixed("model.") | {"loss.weight": torch.ones(2)},
    "two modules deep": lambda: prefixed("model.net."),
    "no counters": lambda: {k: v for k, v in weights().items() if "num_batches" not in k},
    "more counters": lambda: (
        weights() | {"n_averaged": torch.tensor(7), "total_ops": torch.ones(1)}
    ),
    "averaged": lambda: prefixed("module.") | {"n_averaged": torch.tensor(7)},
    "half": lambda: {k: v.to(v.dtype) for k, v in weights().items()},
    "NumPy arrays": lambda: {k: v.numpy() for k, v in weights().items()},
}
NESTED = {
    "bare": lambda s: s,
    **{
        key: lambda s, key=key: {key: s, "epoch": 3, "best": np.float64(91.2)}
        for key in ("state_dict", "model", "net", "ema", "model_state_dict", "params")
    },
    "two levels": lambda s: {"checkpoint": {"model": s}, "args": Namespace(lr=0.1)},
    "an optimiser's": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]},
        "log": [np.float32(1.0), np.int64(2)],
    },
}
NETWORKS = {
    "bare": Net,
    "normalized": lambda: normalized(Net(), 0.5, 0.25),
    "normalized twice": lambda: normalized(normalized(Net(), 0.5, 0.25), 0.0, 1.0),
    "a normalisation of its own": Scaled,
    "parallel": lambda: nn.DataParallel(Net()),
    "in a sequence": lambda: nn.Sequential(nn.Identity(), Net()),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrapping", WRAPPED)
def test_weights_are_found_however_they_are_wrapped(tmp_path, wrapping, network):
    if (wrapping, network) == ("Lightning", "a normalisation of its own"):
        return  # the loss might be a part of the network that it lacks: that is refused
    module = NETWORKS[network]()
    load_weights(module, written(tmp_path, WRAPPED[wrapping]()))
    assert_loaded(module)


@pytest.mark.parametrize("network", ["bare", "normalized"])
@pytest.mark.parametrize("nesting", NESTED)
def test_weights_are_found_however_they_are_nested(tmp_path, nesting, network):
    module = NETWORKS[network]()
    load_weights(module, written(tmp_path, NESTED[nesting](prefixed("module."))))
    assert_loaded(module)


@pytest.mark.parametrize("wrapping", [w for w in WRAPPED if w != "NumPy arrays"])
def test_weights_without_pickles_are_found_alike(tmp_path, wrapping):
    module = normalized(Net(), 0.5, 0.25)
    save_tensors(tmp_path / "w.safetensors", WRAPPED[wrapping]())
    load_weights(module, tmp_path / "w.safetensors")
    assert_loaded(module)


def test_a_wrapper_keeps_its_own_buffers(tmp_path):
    module = normalized(Net(), 0.5, 0.25)
    load_weights(module, written(tmp_path, weights()))
    assert float(module.std) == 0.25
    whole = normalized(Net(), 0.1, 0.9).state_dict()
    load_weights(module, written(tmp_path, whole))
    assert abs(float(module.std) - 0.9) < 1e-6


def test_half_precision_weights_become_the_networks_own(tmp_path):
    module = Net()
    load_weights(module, written(tmp_path, {k: v.half() for k, v in weights().items()}))
    assert module.fc.weight.dtype == torch.float32


@pytest.mark.parametrize("nesting", ["bare", "state_dict", "an optimiser's"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "fc.bias"}, "lacks fc.bias"),
        (lambda s: {k: v for k, v in s.items() if "running_var" not in k}, "lacks bn1.running_var"),
        (lambda s: s | {"fc2.weight": torch.ones(2)}, "holds fc2.weight"),
        (lambda s: s | {"fc.bias": torch.ones(9)}, "fc.bias has shape (9,), not (4,)"),
        (lambda s: prefixed("module.", s | {"fc.bias": torch.ones(9)}), "fc.bias has shape"),
        (lambda s: {k.replace("fc", "at"): v for k, v in s.items()}, "lacks fc.weight and holds"),
    ],
)  # fmt: skip
def test_the_first_key_that_does_not_fit_is_named(tmp_path, spoil, said, nesting):
    module = Net()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(UsageError) as error:
        load_weights(module, written(tmp_path, NESTED[nesting](spoil(weights()))))
    assert said in str(error.value)
    assert "DataParallel" in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_statistics_are_never_left_at_what_they_were(tmp_path):
    """A missing buffer of the network itself is no wrapper's: its outputs would be wrong."""
    state = {k: v for k, v in weights().items() if "running_mean" not in k}
    for network in NETWORKS.values():
        with pytest.raises(UsageError, match="running_mean"):
            load_weights(network(), written(tmp_path, state))


def test_of_several_weights_that_fit_one_must_be_named(tmp_path):
    file = written(tmp_path, {"model": weights(0), "ema": prefixed("module.", weights(1))})
    with pytest.raises(UsageError, match=r"several weights that fit \(model, ema\).*w\.pth:model"):
        load_weights(Net(), file)
    for name, seed in (("model", 0), ("ema", 1)):
        module = Net()
        load_weights(module, file.with_name(f"w.pth:{name}"))
        assert_loaded(module, weights(seed))
    with pytest.raises(UsageError, match="holds no 'mean', but model, ema"):
        load_weights(Net(), file.with_name("w.pth:mean"))


def test_a_student_is_not_taken_for_its_teacher(tmp_path):
    state = prefixed("student.", weights(0)) | prefixed("teacher.", weights(1))
    with pytest.raises(UsageError, match="fits more than one"):
        load_weights(Net(), written(tmp_path, state))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], 3, {"acc": torch.tensor(1.0)}])
def test_files_without_weights_say_so(tmp_path, content):
    with pytest.raises(UsageError, match="holds no state_dict"):
        load_weights(Net(), written(tmp_path, content))


def test_numbers_of_an_older_numpy_are_read(tmp_path):
    file, older = (
        written(tmp_path, {"model": weights(), "acc": np.float64(1.5)}),
        tmp_path / "o.pth",
    )
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(older, "w") as target:
        for name in source.namelist():
            content = source.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(name, content)
    module = Net()
    load_weights(module, older)
    assert_loaded(module)


def test_whole_models_are_named_and_never_run(tmp_path):
    with pytest.raises(UsageError, match=r"a whole torch\.nn\.\S+Linear, which only code"):
        load_weights(Net(), written(tmp_path, nn.Linear(2, 2)))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit(3)",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_is_never_run(tmp_path):
    with pytest.raises(UsageError, match="exec"):
        load_weights(Net(), written(tmp_path, {"model": weights(), "x": Evil()}))
    (tmp_path / "p.pth").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(UsageError, match="not loaded"):
        load_weights(Net(), tmp_path / "p.pth")


# What weights say of themselves


def energy(activation: str) -> ConvEnergy:
    shape = ConvEnergySettings(channels=1, image_size=8, width=2, activation=activation)
    return ConvEnergy(shape)


def test_weights_carry_what_they_need(tmp_path):
    smooth, file = energy("soft_lrelu"), tmp_path / "e.safetensors"
    save_tensors(file, smooth.state_dict(), about(smooth, data="digits"))
    said = read_about(file)
    assert said == {
        "network": "ConvEnergy", "channels": 1, "image_size": 8, "width": 2,
        "activation": "soft_lrelu", "data": "digits",
    }  # fmt: skip
    assert load_safetensors(file)[1] == said
    load_weights(energy("soft_lrelu"), file)


def test_weights_of_another_activation_are_refused(tmp_path):
    smooth, file = energy("soft_lrelu"), tmp_path / "e.safetensors"
    save_tensors(file, smooth.state_dict(), about(smooth))
    with pytest.raises(UsageError, match="made for activation soft_lrelu, not leaky_relu"):
        load_weights(energy("leaky_relu"), file)


def test_weights_that_say_nothing_are_taken_as_they_are(tmp_path):
    file = tmp_path / "e.safetensors"
    save_tensors(file, energy("soft_lrelu").state_dict())
    assert read_about(file) == {}
    load_weights(energy("leaky_relu"), file)


# Files as they come.


def npz(path, state):
    np.savez(path, **{name: value.numpy() for name, value in state.items()})
    path.with_name(path.name + ".npz").rename(path)


WRITERS = {
    "safetensors under another suffix": ("w.pth", save_tensors),
    "a pickle named safetensors": ("w.safetensors", lambda p, s: torch.save(s, p)),
    "upper case": ("w.SAFETENSORS", save_tensors),
    "npz": ("w.pth", npz),
    "no suffix": ("weights", lambda p, s: torch.save(s, p)),
    "the first of a tuple": ("w.pth", lambda p, s: torch.save((s, 3), p)),
    "beside a date": ("w.pth", lambda p, s: torch.save({"model": s, "at": NOW}, p)),
    "sparse": ("w.pth", lambda p, s: torch.save({k: v.to_sparse() for k, v in s.items()}, p)),
}


@pytest.mark.parametrize("how", WRITERS)
def test_a_weight_file_is_read_by_what_it_is(tmp_path, how):
    name, write = WRITERS[how]
    wanted, found = nn.Linear(2, 3), nn.Linear(2, 3)
    write(tmp_path / name, wanted.state_dict())
    load_weights(found, tmp_path / name)
    assert torch.equal(found.weight, wanted.weight)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.pth", b"")


NO_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), "it is empty"),
    "a pointer": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS",
    ),
    "a page": (lambda p: p.write_text("<!DOCTYPE html>"), "web page"),
    "an archive": (zipped, "take model.pth out"),
    "a program": (lambda p: torch.jit.script(nn.Linear(2, 3)).save(str(p)), "TorchScript"),
    "a folder": (lambda p: p.mkdir(), "is no file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", NO_WEIGHTS)
def test_what_holds_no_weights_is_told_by_what_it_is(tmp_path, what):
    write, said = NO_WEIGHTS[what]
    write(tmp_path / "w.pth")
    with pytest.raises(UsageError, match=said):
        load_weights(nn.Linear(2, 3), tmp_path / "w.pth")


def test_a_normalisation_that_is_left_out_is_told(tmp_path, caplog):
    net = nn.Linear(2, 3)
    held = {f"module.1.{k}": v for k, v in net.state_dict().items()}
    torch.save(held | {"module.0.mean": torch.ones(3)}, tmp_path / "w.pth")
    load_weights(nn.Linear(2, 3), tmp_path / "w.pth")
    assert "left out: module.0.mean; it normalises" in caplog.text
    caplog.clear()
    torch.save(held, tmp_path / "w.pth")
    load_weights(nn.Linear(2, 3), tmp_path / "w.pth")
    assert not caplog.text


def test_one_of_several_parts_is_named(tmp_path):
    first, second, found = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3)
    both = {"model": first.state_dict(), "ema": second.state_dict()}
    held = {f"{part}.{k}": v for part, state in both.items() for k, v in state.items()}
    torch.save({"state_dict": held}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"as in FILE:NAME, of ema, model\.$"):
        load_weights(found, tmp_path / "w.pth")
    load_weights(found, tmp_path / "w.pth:ema")
    assert torch.equal(found.weight, second.weight)
