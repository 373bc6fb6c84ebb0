"""Classifier networks besides the published one; the small ones take images in [-1, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.classifiers import WideResNet, WideResNetSettings
from ebm_defense.energies.conv import make_activation
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers


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
        plain_numbers(self)
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
        plain_numbers(self)
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


@dataclass(frozen=True, kw_only=True)
class ZooWideResNetSettings:
    """The shape of a `ZooWideResNet`; the defaults are RobustBench's WRN-28-10 for CIFAR-10.

    Attributes:
        channels: image channels C.
        classes: how many.
        depth: 6n + 4.
        widen: how many times wider than a ResNet.
        layout: tells its settings from a `WideResNet`'s.
    """

    channels: int = 3
    classes: int = 10
    depth: int = 28
    widen: int = 10
    layout: Literal["zoo"] = "zoo"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UsageError(f"a wide ResNet's depth is 6n + 4 with n ≥ 1, not {self.depth}.")

    @classmethod
    def of(cls, state: Mapping[str, Tensor], name: str) -> ZooWideResNetSettings:
        """Read the shape off a state_dict, which errors call `name`.

        Raises:
            UsageError: weights of another architecture.
        """
        try:
            blocks = {key.split(".")[2] for key in state if key.startswith("block1.layer.")}
            return cls(
                channels=state["conv1.weight"].shape[1],
                classes=state["fc.weight"].shape[0],
                depth=6 * len(blocks) + 4,
                widen=state["block1.layer.0.conv1.weight"].shape[0] // 16,
            )
        except (IndexError, KeyError) as error:
            raise UsageError(
                f"{name} lacks {error}: these are no weights of a model zoo's wide ResNet."
            ) from error


class ZooWideResNet(nn.Module):
    """Wide ResNet (Zagoruyko, Komodakis 2016) with the layout of RobustBench's and TRADES' weights.

    No biases before normalisation, the stride on a block's first convolution, and the activated x
    into the shortcut of a block that changes shape. Most of that zoo's take images `[N, C, H, W]`
    in [0, 1].
    """

    def __init__(self, settings: ZooWideResNetSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or ZooWideResNetSettings()
        blocks, width = (s.depth - 4) // 6, 16 * s.widen
        self.conv1 = nn.Conv2d(s.channels, 16, 3, padding=1, bias=False)
        self.block1 = _ZooStage(16, width, blocks, 1)
        self.block2 = _ZooStage(width, 2 * width, blocks, 2)
        self.block3 = _ZooStage(2 * width, 4 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, s.classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out)).mean(dim=(2, 3)))


class _ZooStage(nn.Module):
    def __init__(self, fan_in: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = _ZooBlock(fan_in, width, stride)
        self.layer = nn.Sequential(first, *[_ZooBlock(width, width, 1) for _ in range(blocks - 1)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _ZooBlock(nn.Module):
    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = fan_in != width
        self.convShortcut = nn.Conv2d(fan_in, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.convShortcut is None else self.convShortcut(active))


Network = WideResNet | ConvNet | ResNet | ZooWideResNet
NetworkSettings = WideResNetSettings | ConvNetSettings | ResNetSettings | ZooWideResNetSettings

NETWORKS: dict[type[NetworkSettings], type[Network]] = {
    WideResNetSettings: WideResNet,
    ConvNetSettings: ConvNet,
    ResNetSettings: ResNet,
    ZooWideResNetSettings: ZooWideResNet,
}
"""The networks that a defense folder may hold, by the kind of their settings."""


def make_network(settings: NetworkSettings) -> Network:
    """Make the network, untrained, that these settings are the shape of."""
    return NETWORKS[type(settings)](settings)  # type: ignore[arg-type]
