"""Energies made of energies: and, or, not (Du, Li, Mordatch 2020).

Of densities p_i ∝ exp(−E_i/T): their product, a mixture of them, and one divided by a power of
another. Every composition is an energy like any other, to be sampled or to purify with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.engine.base import Energy
from ebm_defense.errors import UsageError


class _Function(nn.Module):
    """A plain function as a module, so that compositions keep all they are made of alike."""

    def __init__(self, function: Energy) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Composition(nn.Module):
    """What compositions share: their parts, evaluated side by side."""

    def __init__(self, energies: Sequence[Energy]) -> None:
        super().__init__()
        if len(energies) < 2:
            raise UsageError(f"a composition needs two energies or more, not {len(energies)}.")
        parts = [e if isinstance(e, nn.Module) else _Function(e) for e in energies]
        self.energies = nn.ModuleList(parts)

    def values(self, x: Tensor) -> Tensor:
        """Return the parts' energies of images `[N, C, H, W]` in [-1, 1], `[parts, N]`.

        Raises:
            UsageError: a part returns anything but one number an image.
        """
        values = [energy(x) for energy in self.energies]
        for value in values:
            if value.shape != x.shape[:1]:
                raise UsageError(
                    f"every part of a composition must return one number an image, shape "
                    f"{tuple(x.shape[:1])}, but one returned shape {tuple(value.shape)}."
                )
        return torch.stack(values)


class And(_Composition):
    """E = Σ w_i·E_i: images that every part finds likely; the product of the densities p_i^w_i.

    Args:
        energies: two or more, each `[N, C, H, W]` in [-1, 1] to `[N]`.
        weights: one above 0 for each part; all 1 if not given.

    Raises:
        UsageError: fewer than two parts, or weights that do not fit.
    """

    def __init__(self, *energies: Energy, weights: Sequence[float] | None = None) -> None:
        super().__init__(energies)
        self.weights = _weights(weights, len(energies))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        return torch.einsum("p,pn->n", x.new_tensor(self.weights), self.values(x))

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class Or(_Composition):
    """E = −(1/s)·log Σ w_i·exp(−s·E_i): images that some part finds likely.

    Where s = 1/T it is the mixture of the parts' densities, each weighted by w_i times its own
    normaliser; a larger s comes closer to the least energy, min E_i.

    Args:
        energies: two or more, each `[N, C, H, W]` in [-1, 1] to `[N]`.
        sharpness: s > 0, in units of 1/energy; 100 as published.
        weights: one above 0 for each part; all 1 if not given.

    Raises:
        UsageError: fewer than two parts, or a setting that does not fit.
    """

    def __init__(
        self, *energies: Energy, sharpness: float = 100.0, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(energies)
        if not 0 < sharpness < float("inf"):
            raise UsageError(f"sharpness must be above 0, not {sharpness}.")
        self.sharpness, self.weights = sharpness, _weights(weights, len(energies))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        logs = x.new_tensor(self.weights).log()[:, None]
        return -torch.logsumexp(logs - self.sharpness * self.values(x), dim=0) / self.sharpness

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness}, weights={self.weights}"


class Not(_Composition):
    """E = E_0 − α·E_1: images that the first part finds likely and the second does not.

    Only a small α leaves a density: where α·E_1 outgrows E_0 the chain runs away.

    Args:
        energy: E_0, `[N, C, H, W]` in [-1, 1] to `[N]`.
        negated: E_1, likewise.
        strength: α ≥ 0; 0.001 as published.

    Raises:
        UsageError: a strength below 0.
    """

    def __init__(self, energy: Energy, negated: Energy, strength: float = 1e-3) -> None:
        super().__init__((energy, negated))
        if not 0 <= strength < float("inf"):
            raise UsageError(f"strength must be 0 or more, not {strength}.")
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        wanted, negated = self.values(x)
        return wanted - self.strength * negated

    def extra_repr(self) -> str:
        return f"strength={self.strength}"


def _weights(weights: Sequence[float] | None, parts: int) -> tuple[float, ...]:
    given: tuple[Any, ...] = (1.0,) * parts if weights is None else tuple(weights)
    if len(given) != parts or not all(0 < w < float("inf") for w in given):
        raise UsageError(f"{parts} parts need {parts} weights above 0, not {list(given)}.")
    return tuple(float(w) for w in given)
