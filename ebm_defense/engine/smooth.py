"""Smooth activations σ(z) in closed form: their value, slope σ′(z) and curvature σ″(z)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies.conv import SoftLeakyReLU


class Jet(NamedTuple):
    """An activation and its first two derivatives at z, each of z's shape."""

    value: Tensor
    slope: Tensor
    curvature: Tensor


Closed = Callable[[Tensor], Jet]
"""Maps pre-activations to the activation's `Jet` there."""


def silu(z: Tensor) -> Jet:
    """z·s(z) of the logistic s (Elfwing, Uchibe, Doya 2018)."""
    s = torch.sigmoid(z)
    value = z * s
    return Jet(value, s + value - value * s, (s - s * s) * (2.0 + z - 2.0 * value))


def softplus(beta: float) -> Closed:
    """Return log(1 + e^{βz})/β, whose slope is the logistic of βz."""

    def closed(z: Tensor) -> Jet:
        s = torch.sigmoid(beta * z)
        return Jet(F.softplus(z, beta), s, beta * (s - s * s))

    return closed


def soft_leaky(slope: float, width: float) -> Closed:
    """Return the smooth LeakyReLU of `SoftLeakyReLU`."""
    a = (1.0 - slope) / 2.0

    def closed(z: Tensor) -> Jet:
        near = (z * z + width**2).rsqrt()
        value = (1.0 - a) * z + a * (near.reciprocal() - width)
        return Jet(value, (1.0 - a) + a * z * near, a * width**2 * near**3)

    return closed


def leaky(slope: float) -> Closed:
    """Return LeakyReLU, which has no curvature."""

    def closed(z: Tensor) -> Jet:
        rise = slope + (1.0 - slope) * (z > 0).to(z.dtype)
        return Jet(z * rise, rise, torch.zeros_like(z))

    return closed


CLOSED: dict[type[nn.Module], Callable[..., Closed]] = {
    nn.SiLU: lambda layer: silu,
    nn.Softplus: lambda layer: softplus(layer.beta),
    SoftLeakyReLU: lambda layer: soft_leaky(layer.slope, layer.width),
    nn.LeakyReLU: lambda layer: leaky(layer.negative_slope),
}


def closed_form(layer: nn.Module) -> Closed | None:
    """Return an activation layer in closed form, or None where none is known."""
    make = CLOSED.get(type(layer))
    return make and make(layer)
