"""What an engine is: a way to compute ∇U for a whole chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

Energy = Callable[[Tensor], Tensor]


class EnergyGradient(Protocol):
    """∇U of one energy, made once a chain and called once a step, in any grad mode."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return ∇U(x), of the shape and dtype of x `[b, C, H, W]`."""
        ...

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return U(x) `[b]` and ∇U(x)."""
        ...


class Engine(NamedTuple):
    """One implementation of ∇U.

    Attributes:
        supports: whether it computes this energy at such images in this resolved precision.
        prepare: makes the gradient for chains of such images.
    """

    supports: Callable[[Energy, Tensor, str], bool]
    prepare: Callable[[Energy, Tensor, str], EnergyGradient]
