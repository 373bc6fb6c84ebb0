"""Generators G(z), what infers z from an image, and energies of z."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ebm_defense.energies.conv import make_activation
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers


def dense(widths: Sequence[int], activation: str) -> nn.Sequential:
    """Return dense layers of these widths, with an activation between every two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), make_activation(activation)]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What generators and inference nets share.

    Attributes:
        latent: numbers of z that the image is made of.
        upper: numbers of a second layer above it, on which it depends; 0 for none.
        channels: image channels C.
        image_size: H = W in pixels.
        activation: a name in `ACTIVATIONS`, or soft_lrelu:WIDTH.
    """

    latent: int = 32
    upper: int = 0
    channels: int = 1
    image_size: int = 28
    activation: str = "silu"

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if min(self.latent, self.channels, self.image_size) < 1 or self.upper < 0:
            raise UsageError(f"sizes must be at least 1, and upper 0 or more, not {self}.")

    @property
    def size(self) -> int:
        """All numbers of z."""
        return self.latent + self.upper

    @property
    def pixels(self) -> int:
        """C·H·W."""
        return self.channels * self.image_size**2


@dataclass(frozen=True, kw_only=True)
class ConvSettings(ImageSettings):
    """The shape of a `ConvGenerator` or `ConvEncoder`.

    Attributes:
        width: channels at full resolution; a half and a quarter of it have twice and four times
            as many.
    """

    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.image_size % 4:
            raise UsageError(
                f"width must be at least 1 and image_size a multiple of 4, not {self.width} and "
                f"{self.image_size}."
            )


@dataclass(frozen=True, kw_only=True)
class DenseSettings(ImageSettings):
    """The shape of a `DenseGenerator` or `DenseEncoder`.

    Attributes:
        hidden: neurons of each hidden layer.
        layers: hidden layers; with 0 the map is affine.
        bounded: whether images pass a tanh.
    """

    hidden: int = 64
    layers: int = 1
    bounded: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.layers < 0:
            raise UsageError(
                f"hidden must be at least 1 and layers 0 or more, not {self.hidden} and "
                f"{self.layers}."
            )


class Generator(nn.Module):
    """x = G(z): images `[N, C, H, W]` in [-1, 1] of z `[N, latent + upper]`, which is N(0, I).

    With a second layer, z holds the noises of both: the upper layer is its own, and the lower one
    is N(μ(upper), σ²(upper)) (Cui, Wu, Han 2023), made of its noise by μ + σ·noise. So all
    chains are of vectors whose base is N(0, I), whatever the layers.
    """

    def __init__(self, settings: ImageSettings, net: nn.Module, hidden: int) -> None:
        super().__init__()
        self.settings, self.net = settings, net
        widths = (settings.upper, hidden, 2 * settings.latent)
        self.top = dense(widths, settings.activation) if settings.upper else None

    def latents(self, z: Tensor) -> Tensor:
        """Return all layers' latents of z, likewise `[N, latent + upper]`."""
        if self.top is None:
            return z
        noise, upper = z.split([self.settings.latent, self.settings.upper], dim=1)
        mean, log_std = self.top(upper).chunk(2, dim=1)
        return torch.cat([mean + noise * log_std.exp(), upper], dim=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.net(self.latents(z)[:, : self.settings.latent])


class ConvGenerator(Generator):
    """A generator of two transposed convolutions, in the manner of DCGAN (Radford et al. 2016),
    without normalisation.
    """

    settings: ConvSettings

    def __init__(self, settings: ConvSettings | None = None) -> None:
        s = settings or ConvSettings()
        w, side = s.width, s.image_size // 4
        net = nn.Sequential(
            nn.Linear(s.latent, 4 * w * side**2),
            make_activation(s.activation),
            nn.Unflatten(1, (4 * w, side, side)),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1),
            make_activation(s.activation),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1),
            make_activation(s.activation),
            nn.Conv2d(w, s.channels, 3, 1, 1),
            nn.Tanh(),
        )
        super().__init__(s, net, 4 * w)


class DenseGenerator(Generator):
    """A generator of dense layers."""

    settings: DenseSettings

    def __init__(self, settings: DenseSettings | None = None) -> None:
        s = settings or DenseSettings()
        net = nn.Sequential(
            dense((s.latent, *(s.hidden,) * s.layers, s.pixels), s.activation),
            nn.Unflatten(1, (s.channels, s.image_size, s.image_size)),
            nn.Tanh() if s.bounded else nn.Identity(),
        )
        super().__init__(s, net, s.hidden)


class Encoder(nn.Module):
    """Infers z from images: N(μ(x), σ²(x)) over z `[N, latent + upper]`; calling one gives μ(x)."""

    def __init__(self, settings: ImageSettings, net: nn.Module) -> None:
        super().__init__()
        self.settings, self.net = settings, net

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return μ and log σ of images `[N, C, H, W]` in [-1, 1]."""
        mean, log_std = self.net(x).chunk(2, dim=1)
        return mean, log_std

    def forward(self, x: Tensor) -> Tensor:
        return self.moments(x)[0]


class ConvEncoder(Encoder):
    """An encoder of two strided convolutions."""

    settings: ConvSettings

    def __init__(self, settings: ConvSettings | None = None) -> None:
        s = settings or ConvSettings()
        net = nn.Sequential(
            nn.Conv2d(s.channels, s.width, 4, 2, 1),
            make_activation(s.activation),
            nn.Conv2d(s.width, 2 * s.width, 4, 2, 1),
            make_activation(s.activation),
            nn.Flatten(),
            nn.Linear(2 * s.width * (s.image_size // 4) ** 2, 2 * s.size),
        )
        super().__init__(s, net)


class DenseEncoder(Encoder):
    """An encoder of dense layers."""

    settings: DenseSettings

    def __init__(self, settings: DenseSettings | None = None) -> None:
        s = settings or DenseSettings()
        widths = (s.pixels, *(s.hidden,) * s.layers, 2 * s.size)
        super().__init__(s, nn.Sequential(nn.Flatten(), dense(widths, s.activation)))


@dataclass(frozen=True, kw_only=True)
class LatentEnergySettings:
    """The shape of a `LatentEnergy`.

    Attributes:
        size: all numbers of z.
        hidden: neurons of each of the two hidden layers.
        stages: how many networks are added up.
        activation: a name in `ACTIVATIONS`, or soft_lrelu:WIDTH.
    """

    size: int = 32
    hidden: int = 64
    stages: int = 1
    activation: str = "silu"

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if min(self.size, self.hidden, self.stages) < 1:
            raise UsageError(f"a latent energy's sizes must be at least 1, not {self}.")


class LatentEnergy(nn.Module):
    """U(z) beside the base N(0, I): the prior is p(z) ∝ exp(−U(z))·N(z; 0, I) (Pang et al. 2020).

    It is a sum of stages, each of them dense layers; what is learned at once has one, and
    noise-contrastive estimation in stages (Xiao, Han 2022) learns one after the other. A fresh
    stage is 0.
    """

    def __init__(self, settings: LatentEnergySettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or LatentEnergySettings()
        widths = (s.size, s.hidden, s.hidden, 1)
        stages = [dense(widths, s.activation) for _ in range(s.stages)]
        for weight in (w for stage in stages for w in stage[-1].parameters()):
            nn.init.zeros_(weight)
        self.stages = nn.ModuleList(stages)

    def forward(self, z: Tensor) -> Tensor:
        """Map z `[N, size]` to energies `[N]`."""
        return self.first(z, len(self.stages))

    def first(self, z: Tensor, stages: int) -> Tensor:
        """Return the energy `[N]` of the first stages alone; of none it is 0."""
        total = z.new_zeros(len(z))
        for stage in list(self.stages)[:stages]:
            total = total + stage(z)[:, 0]
        return total


@dataclass(frozen=True, kw_only=True)
class PairEnergySettings(ConvSettings):
    """The shape of a `PairEnergy`.

    Attributes:
        hidden: neurons where image and latents meet.
    """

    hidden: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1:
            raise UsageError(f"hidden must be at least 1, not {self.hidden}.")


class PairEnergy(nn.Module):
    """E(x, z) of an image and its latents together (Han et al. 2020): two strided convolutions of
    the image, and dense layers of what they find and z.
    """

    def __init__(self, settings: PairEnergySettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or PairEnergySettings()
        self.image = nn.Sequential(
            nn.Conv2d(s.channels, s.width, 4, 2, 1),
            make_activation(s.activation),
            nn.Conv2d(s.width, 2 * s.width, 4, 2, 1),
            make_activation(s.activation),
            nn.Flatten(),
            nn.Linear(2 * s.width * (s.image_size // 4) ** 2, s.hidden),
        )
        self.both = dense((s.hidden + s.size, s.hidden, s.hidden, 1), s.activation)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] and z `[N, latent + upper]` to energies `[N]`."""
        return self.both(torch.cat([self.image(x), z], dim=1))[:, 0]


@dataclass(frozen=True, kw_only=True)
class LatentClassifierSettings:
    """The shape of a `LatentClassifier`.

    Attributes:
        size: all numbers of z.
        values: how many values each attribute has.
        hidden: neurons of each of the two hidden layers.
        activation: a name in `ACTIVATIONS`, or soft_lrelu:WIDTH.
    """

    size: int = 32
    values: tuple[int, ...] = (10,)
    hidden: int = 64
    activation: str = "silu"

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if min(self.size, self.hidden) < 1 or not self.values or min(self.values) < 2:
            raise UsageError(
                "a latent classifier's sizes must be at least 1, and each attribute's values at "
                f"least 2, not {self}."
            )


class LatentClassifier(nn.Module):
    """p(c | z) of one or more attributes c of a generator's image, such as its class."""

    def __init__(self, settings: LatentClassifierSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or LatentClassifierSettings()
        self.net = dense((s.size, s.hidden, s.hidden, sum(s.values)), s.activation)

    def forward(self, z: Tensor) -> Tensor:
        """Map z `[N, size]` to log-probabilities `[N, Σ values]`, attribute after attribute."""
        parts = self.net(z).split(list(self.settings.values), dim=1)
        return torch.cat([part.log_softmax(1) for part in parts], dim=1)
