"""What a diffusion model is to a purifier: its noise levels, and an estimate of the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "sample", "v_prediction")
"""What a network may be learned to tell of x_t: the noise, the image, or √ᾱ·ε − √(1−ᾱ)·x_0."""


class Denoiser(nn.Module):
    """Estimates ε in x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε, images in [-1, 1] (Ho, Jain, Abbeel 2020).

    A new one gives `alphas`, and overrides `forward`.

    Attributes:
        alphas: ᾱ_0 > ᾱ_1 > …, one number a level of noise; level 0 has the least.
        settings: of which it is made, a frozen dataclass; its `channels` and `image_size` say what
            images it takes.
    """

    alphas: tuple[float, ...]
    settings: Any

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the estimate `[b, C, H, W]` of the noise in x.

        Args:
            x: x_t `[b, C, H, W]`.
            level: t of each image, int64 `[b]`.
        """
        raise NotImplementedError

    @property
    def levels(self) -> int:
        """How many levels of noise it knows."""
        return len(self.alphas)

    def at(self, x: Tensor, level: int) -> Tensor:
        """Return the estimate at one level for all images `[b, C, H, W]`."""
        return self(x, torch.full((len(x),), level, device=x.device))

    def alpha(self, level: Tensor, like: Tensor) -> Tensor:
        """Return ᾱ of levels `[b]`, shaped `[b, 1, 1, 1]`."""
        table = torch.tensor(self.alphas, dtype=like.dtype, device=like.device)
        return table[level].view(-1, 1, 1, 1)

    def nearest(self, sigma: float) -> int:
        """Return the level whose noise, beside an image of its own scale, is nearest to σ.

        Args:
            sigma: √((1−ᾱ)/ᾱ), in [-1, 1] units.
        """
        spreads = [((1 - a) / a) ** 0.5 for a in self.alphas]
        return min(range(self.levels), key=lambda t: abs(spreads[t] - sigma))


def noise_in(told: Tensor, x: Tensor, alpha: Tensor, prediction: str) -> Tensor:
    """Return the noise that a network's answer stands for.

    Args:
        told: the answer `[b, C, H, W]`.
        x: x_t `[b, C, H, W]`.
        alpha: ᾱ_t, `[b, 1, 1, 1]`.
        prediction: one of `PREDICTIONS`.
    """
    if prediction == "sample":
        return (x - alpha.sqrt() * told) / (1 - alpha).sqrt()
    if prediction == "v_prediction":
        return alpha.sqrt() * told + (1 - alpha).sqrt() * x
    return told


def diffused(x: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Return √ᾱ·x + √(1−ᾱ)·noise, of one shape; ᾱ broadcasts."""
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise


def cumulative(betas: Sequence[float]) -> tuple[float, ...]:
    """Return ᾱ_t = ∏_{s ≤ t} (1 − β_s)."""
    found, product = [], 1.0
    for beta in betas:
        product *= 1.0 - beta
        found.append(product)
    return tuple(found)
