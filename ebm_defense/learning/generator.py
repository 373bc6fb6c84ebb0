"""A small generator of images, to begin chains with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The shape of an `ImageGenerator`.

    Attributes:
        channels: image channels C.
        image_size: H = W in pixels, at least 8.
        latent: numbers a latent.
        width: channels of its last hidden layer; those before have two and four times as many.

    Raises:
        UsageError: a setting out of range.
    """

    channels: int = 3
    image_size: int = 32
    latent: int = 64
    width: int = 32

    def __post_init__(self) -> None:
        if self.image_size < 8 or min(self.channels, self.latent, self.width) < 1:
            raise UsageError(
                f"a generator needs image_size ≥ 8, channels, latent and width ≥ 1, not {self}."
            )


class ImageGenerator(nn.Module):
    """Maps latents to images: a linear map to an eighth of the size, then thrice twice as large.

    It has no batch statistics, so that an image depends on its own latent alone.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.least = -(-s.image_size // 8)
        self.first = nn.Linear(s.latent, 4 * s.width * self.least**2)
        widths = (4 * s.width, 4 * s.width, 2 * s.width, s.width)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.last = nn.Conv2d(s.width, s.channels, 3, padding=1)

    @property
    def latent(self) -> int:
        """Numbers a latent."""
        return self.settings.latent

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents `[b, latent]` to images `[b, C, H, W]` in [-1, 1]."""
        size = self.settings.image_size
        x = F.silu(self.first(latents)).unflatten(1, (-1, self.least, self.least))
        for layer in self.layers:
            x = F.silu(layer(F.interpolate(x, scale_factor=2)))
        edge = (x.shape[-1] - size) // 2
        return torch.tanh(self.last(x[..., edge : edge + size, edge : edge + size]))
