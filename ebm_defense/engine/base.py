"""What an engine is: a way to compute ∇U for a whole chain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

Energy = Callable[[Tensor], Tensor]


class EnergyGradient(Protocol):
    """∇U of one energy, made once a chain and called once a step, in any grad mode.

    Attributes:
        signature: what its kernels depend on, but for the numbers in `reads` and the images' shape
            and dtype; None for one whose kernels nobody knows, which is never captured in a graph.
        reads: the tensors that hold the weights. A copy of the gradient (`copy.deepcopy`) given the
            numbers of another's, of the same signature, is the other gradient.
    """

    @property
    def signature(self) -> Hashable: ...

    @property
    def reads(self) -> Sequence[Tensor]: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return ∇U(x), of the shape and dtype of x `[b, C, H, W]`."""
        ...

    def with_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return U(x) `[b]` and ∇U(x)."""
        ...


class Mover(Protocol):
    """Moves chains by their gradient and by noise that it draws where they are."""

    def draw(self, x: Tensor, gradient: Tensor, keys: Tensor, number: Tensor, ahead: int) -> None:
        """Take one step on x `[b, C, H, W]`, in place, with the noise of `KeyedNoise(keys)`.

        Args:
            x: the states.
            gradient: at them.
            keys: of the chains, int64 `[b]`.
            number: int64 `[1]`, on the device, so that a graph can count it up.
            ahead: how many steps after that number this one comes.
        """
        ...


Curvature = Callable[[Tensor, float], Tensor]
"""Maps pre-activations `[b, …]` and a slope for x < 0 to the second derivative that a LeakyReLU is
lent there, in a tensor of its own."""


class HessianProduct(Protocol):
    """∇²U of one energy, made once a chain and called once a step, in any grad mode."""

    def __call__(self, x: Tensor, vector: Tensor, lent: Curvature | None = None) -> Tensor:
        """Return ∇²U(x)·vector, like the vector `[b, C, H, W]`, for each image.

        Args:
            x: the states.
            vector: of their shape and dtype.
            lent: the curvature of corners; they have none without it.
        """
        ...


class Engine(NamedTuple):
    """One implementation of ∇U.

    Attributes:
        supports: whether it computes this energy at such images in this resolved precision.
        prepare: makes the gradient for chains of such images.
        product: makes the Hessian-vector product for them, or None if the engine has none.
    """

    supports: Callable[[Energy, Tensor, str], bool]
    prepare: Callable[[Energy, Tensor, str], EnergyGradient]
    product: Callable[[Energy, Tensor, str], HessianProduct] | None = None
