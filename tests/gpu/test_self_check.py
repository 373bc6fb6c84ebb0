"""A device proves itself at its first use; what is off is left out and said in one sentence."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings
from ebm_defense.engine import prepare, prepare_product, triton_kernels, trust
from ebm_defense.engine.autograd import AutogradGradient
from ebm_defense.engine.convolutional import ConvGradient
from ebm_defense.langevin import Move
from ebm_defense.noise import KeyedNoise
from ebm_defense.precision import devices
from ebm_defense.precision.devices import CHECKS, Check, SelfCheck, checked_device, self_check

FAILED = trust._failed
CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _unknown(gpus, monkeypatch):
    FAILED.cache_clear()
    monkeypatch.setattr(trust, "_failed", FAILED)
    yield
    FAILED.cache_clear()


def test_this_cpu_passes(monkeypatch):
    found = self_check(CPU)
    assert found.failed == []
    assert {"gradient in fp32", "Hessian product", "keyed noise", "chains' moments"} <= set(
        found.errors
    )
    assert not {"Triton", "graphs", "gradient in tf32"} & set(found.errors)


def test_a_gpu_is_checked_for_all_that_it_has():
    found = self_check(GPU)
    assert set(found.errors) == set(CHECKS) - {"Triton"}
    assert found.failed == []


BROKEN = {
    "gradient in fp32": (ConvGradient, "_backward"),
    "Hessian product": ("ebm_defense.engine.product.ConvProduct", "_product"),
    "keyed noise": (KeyedNoise, "normals"),
    "chains' moments": (Move, "apply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_computes_something_else_is_found(name, monkeypatch):
    owner, method = BROKEN[name]
    target = (
        f"{owner}.{method}"
        if isinstance(owner, str)
        else f"{owner.__module__}.{owner.__name__}.{method}"
    )
    module, _, attribute = target.rpartition(".")
    holder = pytest.importorskip(module.rpartition(".")[0])
    honest = getattr(getattr(holder, module.rpartition(".")[2]), attribute)

    def slightly_off(self, x, *rest, **options):
        if name == "chains' moments":
            return honest(self, x, rest[0], 1.05 * options["z"])
        return 1.001 * honest(self, x, *rest, **options)

    monkeypatch.setattr(target, slightly_off)
    if name == "keyed noise":  # the CPU's own is the truth there
        monkeypatch.setattr(
            target,
            lambda self, steps, like: honest(self, steps, like) * (1.001 if like.is_cuda else 1.0),
        )
    assert name in self_check(CPU if name != "keyed noise" else GPU).failed


@pytest.mark.parametrize("error", [math.inf, math.nan, 1.0])
def test_what_failed_is_not_taken_and_said_once(error, monkeypatch, caplog):
    for name in ("gradient in fp32", "Hessian product", "graphs"):
        monkeypatch.setitem(CHECKS, name, Check(lambda _: error, 1e-5, "the plain way is taken"))
    shape = ConvEnergySettings(channels=1, image_size=8, width=2)
    energy = ConvEnergy(shape).requires_grad_(False).to("cuda")
    x = torch.zeros(2, 1, 8, 8, device="cuda")
    with caplog.at_level(logging.WARNING, "ebm_defense"):
        for _ in range(2):
            assert isinstance(prepare(energy, x, "fp32"), AutogradGradient)
            assert isinstance(prepare(energy, x, "bf16"), ConvGradient)
            assert prepare_product(energy, x, "fp32") is None
    said = [r.getMessage() for r in caplog.records if "fails its check" in r.getMessage()]
    assert len(said) == 3
    assert all("Pretend 9000 (9.0)" in s and s.endswith("the plain way is taken.") for s in said)
    assert isinstance(prepare(energy.cpu(), x.cpu(), "fp32"), ConvGradient)


def test_what_a_check_raises_is_its_reason_but_full_memory_is_none(monkeypatch):
    def fail(message):
        def error(device):
            raise RuntimeError(message)

        return Check(error, 1.0, "nothing is done")

    monkeypatch.setattr(devices, "CHECKS", {"warp": fail("no kernel image\nfor this device")})
    found = self_check(CPU)
    assert found.failed == ["warp"]
    assert "RuntimeError: no kernel image)" in devices.sentence(CPU, "warp", found)
    monkeypatch.setattr(devices, "CHECKS", {"warp": fail("CUDA error: out of memory")})
    with pytest.raises(RuntimeError, match="out of memory"):
        self_check(CPU)


def test_a_finding_is_kept_for_one_device_driver_torch_and_triton(monkeypatch):
    made = []
    monkeypatch.setattr(devices, "self_check", lambda d: made.append(d) or SelfCheck(errors={}))
    for _ in range(2):
        checked_device(GPU)
    assert len(made) == 1
    checked_device(GPU, again=True)
    changes = [
        (torch.cuda, "get_device_name", lambda device=None: "Pretend 9001"),
        (devices, "driver", lambda: "600.1"),
        (torch, "__version__", "99.0"),
        (triton_kernels, "VERSION", "99.0"),
    ]
    for count, (owner, name, value) in enumerate(changes, 3):
        monkeypatch.setattr(owner, name, value)
        checked_device(GPU)
        checked_device(GPU)
        assert len(made) == count


def test_checking_does_not_ask_itself(monkeypatch):
    asked = []
    honest = trust.trusted
    monkeypatch.setattr("ebm_defense.engine.trusted", lambda d, w: asked.append(w) or honest(d, w))
    self_check(GPU)
    assert asked  # and every way was taken, or this would never have ended
    assert triton_kernels.works(CPU) is False
