"""Small classifier networks, which take images `[N, C, H, W]` in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings
from ebm_defense.energies.conv import make_activation
from ebm_defense.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ConvNetSettings:
    """The shape of a `ConvNet`.

    Attributes:
        channels: image channels C.
        classes: how many.
        image_size: H = W in pixels, a multiple of 4.
        width: channels of the first convolution; the next have twice and four times as many.
        hidden: neurons of the first dense layer.
        activation: a name in `ACTIVATIONS`.
    """

    channels: int = 1
    classes: int = 10
    image_size: int = 28
    width: int = 32
    hidden: int = 128
    activation: str = "silu"

    def __post_init__(self) -> None:
        make_activation(self.activation)
        if min(self.channels, self.classes, self.width, self.hidden) < 1:
            raise UsageError(f"a ConvNet's sizes must be at least 1, not {self}.")
        if self.image_size < 4 or self.image_size % 4:
            raise UsageError(f"image_size must be a multiple of 4, not {self.image_size}.")


class ConvNet(nn.Module):
    """Three convolutions, two of which halve the image, and two dense layers; no normalisation."""

    def __init__(self, settings: ConvNetSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or ConvNetSettings()
        w = s.width
        self.net = nn.Sequential(
            nn.Conv2d(s.channels, w, 3, 1, 1),
            make_activation(s.activation),
            nn.Conv2d(w, 2 * w, 4, 2, 1),
            make_activation(s.activation),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1),
            make_activation(s.activation),
            nn.Flatten(),
            nn.Linear(4 * w * (s.image_size // 4) ** 2, s.hidden),
            make_activation(s.activation),
            nn.Linear(s.hidden, s.classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@dataclass(frozen=True, kw_only=True)
class ResNetSettings:
    """The shape of a small `ResNet`.

    Attributes:
        channels: image channels C.
        classes: how many.
        stem: channels of the strided 5×5 convolution; the stages have twice and four times as many.
    """

    channels: int = 1
    classes: int = 10
    stem: int = 32

    def __post_init__(self) -> None:
        if min(self.channels, self.classes, self.stem) < 1:
            raise UsageError(f"a ResNet's sizes must be at least 1, not {self}.")


class ResNet(nn.Module):
    """A small residual network (He et al. 2016): strided stem, two blocks, average pooling."""

    def __init__(self, settings: ResNetSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or ResNetSettings()
        self.net = nn.Sequential(
            nn.Conv2d(s.channels, s.stem, 5, 2, 2),
            nn.BatchNorm2d(s.stem),
            nn.ReLU(),
            _Block(s.stem, 2 * s.stem, 1),
            _Block(2 * s.stem, 4 * s.stem, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * s.stem, s.classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _Block(nn.Module):
    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(fan_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


Network = WideResNet | ConvNet | ResNet
NetworkSettings = WideResNetSettings | ConvNetSettings | ResNetSettings

NETWORKS: dict[type[NetworkSettings], type[Network]] = {
    WideResNetSettings: WideResNet,
    ConvNetSettings: ConvNet,
    ResNetSettings: ResNet,
}
"""The networks that a defense folder may hold, by the kind of their settings."""


def make_network(settings: NetworkSettings) -> Network:
    """Make the network, untrained, that these settings are the shape of."""
    return NETWORKS[type(settings)](settings)  # type: ignore[arg-type]
