"""Classifier networks, and adapting anybody's to [0, 1] images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers


@dataclass(frozen=True, kw_only=True)
class WideResNetSettings:
    """The shape of a `WideResNet`; the defaults are the published WRN-28-10 for CIFAR-10."""

    channels: int = 3
    classes: int = 10
    depth: int = 28
    widen: int = 10

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.depth < 10 or (self.depth - 4) % 6:
            raise UsageError(f"a wide ResNet's depth is 6n + 4 with n ≥ 1, not {self.depth}.")

    @classmethod
    def of(cls, state: Mapping[str, Tensor], name: str) -> WideResNetSettings:
        """Read the shape off a state_dict, which errors call `name`.

        Raises:
            UsageError: weights of another architecture.
        """
        try:
            blocks = len({key.split(".")[1] for key in state if key.startswith("layer1.")})
            return cls(
                channels=state["conv1.weight"].shape[1],
                classes=state["linear.weight"].shape[0],
                depth=6 * blocks + 4,
                widen=state["layer1.0.conv1.weight"].shape[0] // 16,
            )
        except (IndexError, KeyError) as error:
            raise UsageError(
                f"{name} lacks {error}: these are no weights of a wide ResNet."
            ) from error


class _Block(nn.Module):
    """Pre-activation block with the stride on `conv2` and the raw x into the shortcut."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(fan_in)
        self.conv1 = nn.Conv2d(fan_in, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1)
        identity = stride == 1 and fan_in == width
        self.shortcut = nn.Sequential(*([] if identity else [nn.Conv2d(fan_in, width, 1, stride)]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class WideResNet(nn.Module):
    """Pre-activation wide ResNet with the layout of the published weights.

    Zagoruyko, Komodakis 2016, as used by Hill, Mitchell, Zhu 2021: a bias on every convolution,
    no dropout. Takes images `[N, C, H, W]` in [-1, 1]; `normalized` makes that [0, 1].
    """

    def __init__(self, settings: WideResNetSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or WideResNetSettings()
        blocks, width = (s.depth - 4) // 6, 16 * s.widen
        self.conv1 = nn.Conv2d(s.channels, 16, 3, padding=1)
        self.layer1 = _stage(16, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.linear = nn.Linear(4 * width, s.classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.relu(self.bn1(out)).mean(dim=(2, 3)))


def _stage(fan_in: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(fan_in, width, stride)
    return nn.Sequential(first, *[_Block(width, width, 1) for _ in range(blocks - 1)])


class Normalized(nn.Module):
    """A classifier behind (x − mean)/std and an optional resize; made by `normalized`."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, classifier: nn.Module, mean: Tensor, std: Tensor, size: tuple[int, int] | None
    ) -> None:
        super().__init__()
        self.classifier, self.size = classifier, size
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        return self.classifier(((x - self.mean) / self.std).to(dtype))


def normalized(
    classifier: nn.Module,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    size: int | tuple[int, int] | None = None,
) -> nn.Module:
    """Wrap a classifier that wants normalised or resized input so that it takes [0, 1] images.

    Args:
        classifier: maps `[N, C, h, w]` of (x − mean)/std to logits `[N, classes]`.
        mean: one number, or one a channel, in [0, 1] units.
        std: likewise, above 0.
        size: the height and width the classifier wants; bilinear with antialiasing.

    Raises:
        UsageError: a std that is not above 0, or a mean beyond 1, of pixels from 0 to 255.
    """
    centre, scale = torch.as_tensor(mean).float(), torch.as_tensor(std).float()
    if not bool((scale > 0).all()):
        raise UsageError(f"std must be above 0 in every channel, not {std}.")
    if bool((centre.abs() > 1).any()):
        raise UsageError(f"mean must lie in [0, 1], not {mean}; divide it, and std, by 255.")
    pair = (size, size) if isinstance(size, int) else size
    return Normalized(classifier, centre, scale, pair)
