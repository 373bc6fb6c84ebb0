"""What purifiers with latents share, whatever moves them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from ebm_defense.engine.widened import widened
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import real, whole
from ebm_defense.noise import Noise
from ebm_defense.purifiers.base import SteppedPurifier

Joint = dict[str, Tensor]
"""Tensors by name, each with a batch axis first: z, and what else a purifier's chain is of."""

KINDS: dict[type, Callable[[Any, str], float]] = {int: whole, float: real}


class LatentPath(SteppedPurifier):
    """A purifier of networks that goes its way in a state of named tensors, such as latents z.

    Attributes:
        steps: K ≥ 0.
    """

    steps: int

    def net(self, name: str, like: Tensor) -> nn.Module:
        """Return one of its networks, in the dtype of what it is given."""
        network: nn.Module = getattr(self, name)
        weight = next(network.parameters(), like)
        wide = network if weight.dtype == like.dtype else widened(network, like)
        assert isinstance(wide, nn.Module)
        return wide

    def check(self, **others: float) -> None:
        """Make plain numbers of its settings, and refuse those out of range.

        Args:
            **others: what must be above 0, by its name.
        """
        for name, kind in self.arguments().items():
            if kind in KINDS:
                setattr(self, name, KINDS[kind](getattr(self, name), name))
        if self.steps < 0:
            raise UsageError(f"steps must be 0 or more, not {self.steps}.")
        for name, value in others.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0, not {value}.")

    @property
    def chain_steps(self) -> int:  # type: ignore[override]
        return self.steps

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        shapes = (getattr(network, "settings", None) for network in self.networks.values())
        shape: Any = next((s for s in shapes if hasattr(s, "image_size")), None)
        return None if shape is None else (shape.channels, shape.image_size, shape.image_size)

    def probe_vjp(self, images: Tensor, noise: Noise) -> None:
        x = self.enter(images)
        self.vjp_step(x, x, noise, 0)

    def brief(self, images: Tensor) -> Self:
        return self.remade(steps=min(1, self.steps))


def to_unit(x: Tensor) -> Tensor:
    """Return images of [-1, 1] on the scale [0, 1]."""
    return (x + 1.0) / 2.0


def from_unit(images: Tensor) -> Tensor:
    """Return images of [0, 1] on the scale [-1, 1]."""
    return images * 2.0 - 1.0


def half_square(z: Tensor) -> Tensor:
    """Return ‖z‖²/2 of each row, `[b]`: −log N(z; 0, I) but for a constant."""
    return z.flatten(1).square().sum(1) / 2.0
