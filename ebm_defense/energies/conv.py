"""Energies U(x): anything that maps `[N, C, H, W]` in [-1, 1] to `[N]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers


class SoftLeakyReLU(nn.Module):
    """Smooth LeakyReLU, (1 − a)·x + a·√(x² + e²) − a·e (Du, Hill, Cai 2026, MEFA).

    Its slope runs from 1 − 2a to 1, and unlike LeakyReLU's it has curvature, so that a
    gradient through the chain knows where the chain would have gone.

    Args:
        slope: the slope for x → −∞, in [0, 1); a = (1 − slope)/2.
        width: e > 0, the half-width of the bend, in units of x.
    """

    def __init__(self, slope: float = 0.05, width: float = 0.01) -> None:
        super().__init__()
        self.slope, self.width = slope, width

    def forward(self, x: Tensor) -> Tensor:
        return _SoftLeakyReLU.apply(x, (1.0 - self.slope) / 2.0, self.width)

    def extra_repr(self) -> str:
        return f"slope={self.slope}, width={self.width}"


class _SoftLeakyReLU(torch.autograd.Function):
    """Keeps x alone for the backward pass; the backward pass can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: float, e: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.a, ctx.e = a, e
        return (1 - a) * x + a * (x * x + e * e).sqrt() - a * e

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        slope = (1 - ctx.a) + ctx.a * x * (x * x + ctx.e * ctx.e).rsqrt()
        return grads[0] * slope, None, None


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.05),
    "relu": lambda: nn.LeakyReLU(0.0),
    "soft_lrelu": lambda: SoftLeakyReLU(slope=0.05, width=0.01),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}

WIDTH = "soft_lrelu:"
"""Before one number: a smooth LeakyReLU of that width, as in soft_lrelu:0.3; before two, also of
that slope, as in MEFA's soft_lrelu:0.01:0.02."""


def make_activation(name: str) -> nn.Module:
    """Make an activation from a name in `ACTIVATIONS`, soft_lrelu:WIDTH or soft_lrelu:WIDTH:SLOPE.

    Raises:
        UsageError: another name, a width that is not above 0, or a slope outside [0, 1).
    """
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    words = name.removeprefix(WIDTH).split(":") if name.startswith(WIDTH) else []
    try:
        width, slope = (*map(float, words), 0.05)[:2] if len(words) in (1, 2) else (0.0, 0.0)
    except ValueError:
        width, slope = 0.0, 0.0
    if not (0.0 < width < float("inf") and 0.0 <= slope < 1.0):
        names = ", ".join(ACTIVATIONS)
        raise UsageError(
            f"activation is {name!r}; choose one of {names}, or {WIDTH}WIDTH above 0, or "
            f"{WIDTH}WIDTH:SLOPE with a slope in [0, 1)."
        )
    return SoftLeakyReLU(slope=slope, width=width)


@dataclass(frozen=True, kw_only=True)
class ConvEnergySettings:
    """The shape of a `ConvEnergy`.

    Attributes:
        channels: image channels C.
        image_size: H = W in pixels, at least 8.
        width: channels of the first layer (32 as published).
        activation: as `make_activation` takes it.
    """

    channels: int = 3
    image_size: int = 32
    width: int = 32
    activation: str = "leaky_relu"

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if self.image_size < 8 or self.channels < 1 or self.width < 1:
            raise UsageError(
                f"an energy needs image_size ≥ 8, channels ≥ 1 and width ≥ 1, not {self}."
            )

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], name: str, image_size: int, activation: str
    ) -> ConvEnergySettings:
        """Read channels and width off a state_dict, which errors call `name`; the rest is asked.

        Raises:
            UsageError: weights of another architecture.
        """
        if "f.0.weight" not in state:
            raise UsageError(f"{name} lacks f.0.weight: these are no weights of a conv energy.")
        width, channels = state["f.0.weight"].shape[:2]
        return cls(channels=channels, image_size=image_size, width=width, activation=activation)


class ConvEnergy(nn.Module):
    """The energy network of Hill, Mitchell, Zhu (2021), for any image size.

    One `nn.Sequential` named `f`: a 3×3 convolution, three strided 4×4 convolutions that halve
    the image and double the channels, and one that covers what is left. With the default
    settings its keys and its 693,569 parameters are those of the published weights.
    """

    def __init__(self, settings: ConvEnergySettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or ConvEnergySettings()
        widths = [s.width * 2**i for i in range(4)]
        layers: list[nn.Module] = [nn.Conv2d(s.channels, widths[0], 3, 1, 1)]
        for fan_in, fan_out in pairwise(widths):
            layers += [make_activation(s.activation), nn.Conv2d(fan_in, fan_out, 4, 2, 1)]
        layers += [make_activation(s.activation), nn.Conv2d(widths[-1], 1, s.image_size // 8)]
        self.f = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        return self.f(x).reshape(x.shape[0])


def channels_last(module: nn.Module) -> nn.Module:
    """Lay a module's weights out in channels_last, in which its convolutions run fastest."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
