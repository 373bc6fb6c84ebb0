"""An energy of points: the small network on which learning is compared with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies.conv import make_activation
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

TINY = 1e-6
"""Keeps the distance from the origin smooth there."""


@dataclass(frozen=True, kw_only=True)
class PointEnergySettings:
    """The shape of a `PointEnergy`.

    Attributes:
        channels: numbers a point.
        image_size: 1: a point is an image of one pixel.
        width: channels of the first layer; the next three have twice as many.
        activation: as `make_activation` takes it.
        reach: what 1 stands for in the units that the network sees, above 0.
        radial: whether the network also sees a point's distance from the origin.

    Raises:
        UsageError: a setting out of range.
    """

    channels: int = 2
    image_size: int = 1
    width: int = 32
    activation: str = "leaky_relu"
    reach: float = 1.0
    radial: bool = False

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if min(self.channels, self.width) < 1 or self.image_size != 1 or not self.reach > 0:
            raise UsageError(
                "an energy of points needs channels ≥ 1, width ≥ 1, image_size 1 and reach above "
                f"0, not {self}."
            )


class PointEnergy(nn.Module):
    """The toy network of Nijkamp et al. (2019, Anatomy): 1×1 convolutions 2→32→64→64→64→1.

    Points are images of one pixel, `[N, d, 1, 1]`, so that all that takes images takes them.
    """

    def __init__(self, settings: PointEnergySettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or PointEnergySettings()
        widths = [s.channels + s.radial, s.width, 2 * s.width, 2 * s.width, 2 * s.width]
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Conv2d(fan_in, fan_out, 1), make_activation(s.activation)]
        self.f = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map points `[N, d, 1, 1]` in [-1, 1] to energies `[N]`."""
        h = self.settings.reach * x.flatten(1)
        if self.settings.radial:
            h = torch.cat([h, h.square().sum(1, keepdim=True).add(TINY).sqrt()], dim=1)
        for layer in self.f:
            h = _linear(h, layer) if isinstance(layer, nn.Conv2d) else layer(h)
        return h[:, 0]


def _linear(h: Tensor, layer: nn.Conv2d) -> Tensor:
    """Apply a 1×1 convolution to one pixel as the matrix product that it is, which is faster."""
    return F.linear(h, layer.weight.flatten(1), layer.bias)
