"""Engines: the ways to compute a chain's energy gradient, chosen by energy, images and precision.

Every engine computes the same ∇U up to rounding; plain autograd is the one that the others are
held against, and takes whatever they do not.
"""

from __future__ import annotations

from torch import Tensor

from ebm_defense.engine import layered
from ebm_defense.engine.autograd import AutogradGradient, energy_and_gradient
from ebm_defense.engine.base import Curvature, Energy, EnergyGradient, Engine, HessianProduct
from ebm_defense.engine.convolutional import ConvGradient, supports
from ebm_defense.engine.product import ConvProduct
from ebm_defense.engine.report import fell_back
from ebm_defense.engine.trust import trusted
from ebm_defense.engine.widened import widened
from ebm_defense.errors import UsageError
from ebm_defense.runtime.memory import is_full

__all__ = [
    "ENGINES",
    "Curvature",
    "Energy",
    "EnergyGradient",
    "Engine",
    "HessianProduct",
    "choose_engine",
    "energy_and_gradient",
    "prepare",
    "prepare_product",
]

ENGINES: dict[str, Engine] = {
    "convolutional": Engine(supports, ConvGradient.prepare, ConvProduct.prepare),
    "layered": Engine(
        layered.supports,
        # `prepare` itself is made below.
        layered.prepared(lambda energy, x, precision: prepare(energy, x, precision)),  # noqa: PLW0108
    ),
    "autograd": Engine(
        lambda energy, x, precision: True,
        lambda energy, x, precision: AutogradGradient(energy, precision),
    ),
}
"""By name, the fastest first."""


def choose_engine(energy: Energy, x: Tensor, precision: str) -> str:
    """Return the first engine's name that supports this energy at images such as x.

    Args:
        energy: maps `[b, C, H, W]` to `[b]`.
        x: the images `[b, C, H, W]`, in [-1, 1] units.
        precision: resolved: "fp32", "tf32", "bf16" or "fp64".
    """
    return next(name for name, e in ENGINES.items() if e.supports(energy, x, precision))


def prepare(energy: Energy, x: Tensor, precision: str, engine: str = "auto") -> EnergyGradient:
    """Return ∇U for a chain from x; plain autograd where the engine fails to be made.

    Raises:
        UsageError: an engine that is unknown or does not support this energy.
    """
    energy = widened(energy, x)
    name = choose_engine(energy, x, precision) if engine == "auto" else engine
    if name not in ENGINES:
        raise UsageError(f"engine is {name!r}; choose one of auto, {', '.join(ENGINES)}.")
    if not ENGINES[name].supports(energy, x, precision):
        raise UsageError(f"the engine {name} does not support {_kind(energy)} here; use auto.")
    if name != "autograd" and not trusted(x.device, f"gradient in {precision}"):
        return AutogradGradient(energy, precision)
    try:
        return ENGINES[name].prepare(energy, x, precision)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        _fell_back(name, energy, error)
        return AutogradGradient(energy, precision)


def prepare_product(energy: Energy, x: Tensor, precision: str) -> HessianProduct | None:
    """Return ∇²U·v for a chain's states such as x, or None where only autograd knows it."""
    energy = widened(energy, x)
    name = choose_engine(energy, x, precision)
    product = ENGINES[name].product
    if product is not None and not trusted(x.device, "Hessian product"):
        return None
    try:
        return product and product(energy, x, precision)
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        _fell_back(f"{name} products", energy, error)
        return None


def _fell_back(name: str, energy: Energy, error: Exception) -> None:
    """Say so, but where memory is full: fewer chains are then faster than another engine."""
    if is_full(error):
        raise error
    fell_back(name, _kind(energy), str(error).partition("\n")[0])


def _kind(energy: Energy) -> str:
    return getattr(energy, "__name__", type(energy).__name__)
