"""Whether a device computes what it should: shown at its first use, kept, and left out if not.

Nobody has run this code on every GPU, driver and torch. So the first use of one compares each fast
way with a plain one on a few small networks; a way that is off is not taken there, and one sentence
says so. The finding holds for one device, driver, torch and Triton.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense import __version__
from ebm_defense.energies.conv import ConvEnergy, ConvEnergySettings, SoftLeakyReLU
from ebm_defense.energies.quadratic import QuadraticEnergy
from ebm_defense.engine import prepare, prepare_product, triton_kernels
from ebm_defense.engine.cuda_graphs import Captured, Pool
from ebm_defense.engine.derivatives import hessian_product
from ebm_defense.engine.trust import under_check
from ebm_defense.langevin import LangevinSettings, run_chain
from ebm_defense.noise import LACKS_64_BITS, KeyedNoise, chain_keys
from ebm_defense.precision.findings import keep, look_up
from ebm_defense.precision.names import resolve_precision
from ebm_defense.runtime.memory import is_full

ACTIVATIONS = ("leaky_relu", "soft_lrelu")

_log = logging.getLogger("ebm_defense")


class Check(NamedTuple):
    """One comparison.

    Attributes:
        error: how far a device is off, or None where it has no such way.
        limit: the largest error that counts as none.
        instead: what is done without this way.
    """

    error: Callable[[torch.device], float | None]
    limit: float
    instead: str


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What was found of a device.

    Attributes:
        errors: by the names in `CHECKS`, infinite where it could not be computed.
        reasons: by those names, what it raised then.
    """

    errors: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """The names of what is off."""
        # Written so that a NaN fails the comparison.
        return [n for n, e in self.errors.items() if n in CHECKS and not e <= CHECKS[n].limit]


def checked_device(device: torch.device, again: bool = False) -> SelfCheck:
    """Return what was found of a device, checking it now if nothing is known, or if asked again."""
    key = device_key(device)
    found = None if again else next(look_up(key, SelfCheck), None)
    if found is None:
        found = self_check(device)
        keep(key, found)
    for name in found.failed:
        _log.warning("%s", sentence(device, name, found))
    return found


def sentence(device: torch.device, name: str, found: SelfCheck) -> str:
    """Say what a device gets wrong and what is done instead."""
    why = found.reasons.get(name, f"off by {found.errors[name]:.2g}, above {CHECKS[name].limit:g}")
    return f"on {device_name(device)} the {name} fails its check ({why}); {CHECKS[name].instead}."


def self_check(device: torch.device) -> SelfCheck:
    """Make every check of a device, in seconds.

    Raises:
        RuntimeError: memory is full, of which nothing follows.
    """
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with under_check():
        for name, check in CHECKS.items():
            try:
                error = check.error(device)
            except Exception as raised:  # compilers and drivers fail in too many ways to name
                if is_full(raised):
                    raise
                error = math.inf
                reasons[name] = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
            if error is not None:
                errors[name] = error
    return SelfCheck(errors=errors, reasons=reasons)


def device_key(device: torch.device) -> str:
    """Return the key of a device's finding."""
    parts = [device_name(device), driver(), torch.__version__, triton_kernels.VERSION, __version__]
    return hashlib.sha256(json.dumps(["device", *parts]).encode()).hexdigest()[:32]


def device_name(device: torch.device) -> str:
    """Return a GPU's name, or the kind of another device."""
    if device.type != "cuda":
        return f"{device.type} {platform.machine()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


def driver() -> str:
    """Return the version of the NVIDIA driver, or of ROCm; "none" where neither is."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    try:
        lines = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "none"
    return lines[0].removeprefix("NVRM version:").strip() if lines else "none"


def _energy(activation: str) -> ConvEnergy:
    """Return a small network of the published shape, its weights drawn from no global generator."""
    shape = ConvEnergySettings(channels=3, image_size=16, width=8, activation=activation)
    energy, generator = ConvEnergy(shape).requires_grad_(False), torch.Generator().manual_seed(0)
    for p in energy.parameters():
        spread = math.prod(p.shape[1:]) ** -0.5 if p.ndim > 1 else 0.1
        p.copy_(spread * torch.randn(p.shape, generator=generator))
    for layer in energy.f:
        if isinstance(layer, SoftLeakyReLU):
            layer.width = 0.1  # at a narrower bend float32 itself loses digits of the curvature
    return energy


def _states(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _off(found: Tensor, exact: Tensor) -> float:
    found, exact = found.cpu().double(), exact.cpu().double()
    return float((found - exact).norm() / exact.norm())


def _gradient(precision: str) -> Callable[[torch.device], float | None]:
    """Return the error of ∇U by the fastest engine to autograd in float64 on the CPU.

    That of bf16, which turns the corners of some activations around, is told in the error of plain
    autograd in bf16 on the same device.
    """

    def error(device: torch.device) -> float | None:
        if resolve_precision(precision, device, torch.float32) != precision:
            return None
        return max(one(device, activation) for activation in ACTIVATIONS)

    def one(device: torch.device, activation: str) -> float:
        energy, x = _energy(activation), _states()
        exact = prepare(_energy(activation).double(), x.double(), "fp64")(x.double())
        x, energy = x.to(device), energy.to(device)
        error = _off(prepare(energy, x, precision)(x), exact)
        plain = prepare(energy, x, precision, engine="autograd")
        return error / _off(plain(x), exact) if precision == "bf16" else error

    return error


def _product(device: torch.device) -> float | None:
    """Return the error of ∇²U·v to double backward in float64 on the CPU."""
    energy, x, v = _energy("soft_lrelu"), _states(), _states().flip(0)
    exact = hessian_product(_energy("soft_lrelu").double(), x.double(), v.double())
    x, v = x.to(device), v.to(device)
    product = prepare_product(energy.to(device), x, "fp32")
    return None if product is None else _off(product(x, v), exact)


def _noise(device: torch.device) -> float:
    """Return the largest difference of keyed noise to the CPU's."""
    keys = chain_keys(0, "self-check", range(8), range(1))[0]
    there = keys if device.type in LACKS_64_BITS else keys.to(device)
    like = torch.empty(8, 3, 33, 33)
    found = KeyedNoise(there).normals(range(3, 5), like.to(device))
    return float((found.cpu() - KeyedNoise(keys).normals(range(3, 5), like)).abs().max())


def _triton(device: torch.device) -> float | None:
    """Return 0 where Triton's kernels agree with torch's operations, 1 where not."""
    if triton_kernels.VERSION == "none" or device.type != "cuda":
        return None
    return 0.0 if triton_kernels.agrees_with_torch(device) else 1.0


def _graphs(device: torch.device) -> float | None:
    """Return 0 where replays are the single steps to the last bit; else the capture raises."""
    if device.type != "cuda":
        return None
    keys = chain_keys(0, "self-check", range(8), range(1))[0].to(device)
    x, move = _states().to(device), LangevinSettings(step_size=0.05, temperature=0.0025).move
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        gradient = prepare(_energy("leaky_relu").to(device), x, "fp32")
        Captured(x, KeyedNoise(keys), gradient, move, Pool()).free()
    return 0.0


def _moments(device: torch.device) -> float:
    """Return the largest z-score of chains' means and variances on a quadratic energy.

    Under it the chain is autoregressive of order one: with ρ = 1 − ε²a/2T its mean from 1 is ρᴷ and
    its variance ε²·(1 − ρ²ᴷ)/(1 − ρ²).
    """
    chains, steps, step_size = 4096, 20, 0.5
    curvature = torch.linspace(0.5, 4.0, 16)
    energy = QuadraticEnergy(torch.zeros(1, 4, 4), curvature).to(device)
    keys = chain_keys(0, "self-check moments", range(chains), range(1))[0].to(device)
    settings = LangevinSettings(steps=steps, step_size=step_size, temperature=1.0)
    start = torch.ones(chains, 1, 4, 4, device=device)
    ends = run_chain(start, KeyedNoise(keys), energy=energy, settings=settings)
    ends = ends.cpu().double().flatten(1)
    rho = 1.0 - step_size**2 * curvature.double() / 2.0
    mean, variance = rho**steps, step_size**2 * (1 - rho ** (2 * steps)) / (1 - rho**2)
    of_mean = (ends.mean(0) - mean) / (variance / chains).sqrt()
    of_variance = (ends.var(0) / variance - 1.0) / (2.0 / (chains - 1)) ** 0.5
    return float(torch.cat([of_mean, of_variance]).abs().max())


_AUTOGRAD = "gradients in it are autograd's there"
_CPU = "its chains should not be believed: use --device cpu"
CHECKS: dict[str, Check] = {
    "gradient in fp32": Check(_gradient("fp32"), 1e-5, _AUTOGRAD),
    "gradient in tf32": Check(_gradient("tf32"), 2e-3, _AUTOGRAD),
    "gradient in bf16": Check(_gradient("bf16"), 2.0, _AUTOGRAD),
    "Hessian product": Check(_product, 1e-5, "products are double backward's there"),
    "keyed noise": Check(_noise, 1e-5, _CPU),
    "Triton": Check(_triton, 0.0, "torch's own operations are used there"),
    "graphs": Check(_graphs, 0.0, "steps are taken one by one there"),
    "chains' moments": Check(_moments, 5.0, _CPU),
}
"""By name; errors are relative but for bf16's, in autograd's own, noise's, in its own units, and
moments', in standard errors."""
