"""The DDPM++ network of score_sde, which EDM has too, as a denoiser."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.denoisers.base import Denoiser
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

LEVELS, FIRST_BETA, LAST_BETA = 1000, 0.1, 20.0
"""Of the variance-preserving diffusion in continuous time (Song et al. 2021, eq. 32 to 34)."""
SPREAD = 0.5
"""σ_data of EDM's preconditioning."""
PRECONDITIONINGS = ("vp", "edm")


@dataclass(frozen=True, kw_only=True)
class SongSettings:
    """A DDPM++ network.

    Attributes:
        channels: of the images.
        image_size: their height and width.
        width: channels that the multiples are of.
        multiples: channels of each resolution, each half the one before.
        blocks: residual blocks a resolution.
        attention: numbers of the resolutions with attention, the finest being 0.
        embedding: channels of the noise level's embedding.
        preconditioning: "vp", the network tells ε at time 999·t (Song et al. 2021), or "edm"
            (Karras et al. 2022, table 1).
    """

    channels: int = 3
    image_size: int = 32
    width: int = 128
    multiples: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 8
    attention: tuple[int, ...] = (1,)
    embedding: int = 512
    preconditioning: str = "vp"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.preconditioning not in PRECONDITIONINGS:
            raise UsageError(
                f"the preconditioning is {self.preconditioning!r}; choose one of "
                f"{', '.join(PRECONDITIONINGS)}."
            )
        halvings = 2 ** (len(self.multiples) - 1)
        if self.image_size % halvings:
            raise UsageError(f"image_size must be a multiple of {halvings}, not {self.image_size}.")


class SongDenoiser(Denoiser):
    """A `SongNet` at the levels t = 1/1000 to 1 of the variance-preserving diffusion.

    Args:
        settings: of the network.
    """

    def __init__(self, settings: SongSettings) -> None:
        super().__init__()
        self.settings = settings
        self.alphas = tuple(_alpha((k + 1) / LEVELS) for k in range(LEVELS))
        self.net = SongNet(settings)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        dtype = self.net.map_layer0.weight.dtype
        alpha = self.alpha(level, x)
        if self.settings.preconditioning == "vp":
            time = (level + 1).to(x.dtype) / LEVELS * (LEVELS - 1)
            told: Tensor = self.net(x.to(dtype), time.to(dtype)).to(x.dtype)
            return told
        sigma = ((1 - alpha) / alpha).sqrt()
        scaled, total = x / alpha.sqrt(), (sigma**2 + SPREAD**2).sqrt()
        heard = (sigma.log() / 4).flatten()
        told = self.net((scaled / total).to(dtype), heard.to(dtype)).to(x.dtype)
        image = SPREAD**2 / total**2 * scaled + sigma * SPREAD / total * told
        return (scaled - image) / sigma


def _alpha(t: float) -> float:
    """Return ᾱ(t) = exp(−½t²(β_max − β_min) − tβ_min)."""
    return math.exp(-0.5 * t**2 * (LAST_BETA - FIRST_BETA) - t * FIRST_BETA)


class SongNet(nn.Module):
    """The network, its weights by EDM's names (Song et al. 2021, DDPM++; Karras et al. 2022)."""

    def __init__(self, settings: SongSettings) -> None:
        super().__init__()
        self.width = settings.width
        self.map_layer0 = nn.Linear(settings.width, settings.embedding)
        self.map_layer1 = nn.Linear(settings.embedding, settings.embedding)
        self.enc, skips = _encoder(settings)
        self.dec = _decoder(settings, skips)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return the answer `[b, C, H, W]` to x, and to the noise as time `[b]` says it."""
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(embedded(time, self.width)))))
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if isinstance(layer, Block):
                joins = layer.conv0.in_channels != x.shape[1]
                x = layer(torch.cat([x, skips.pop()], 1) if joins else x, embedding)
            else:
                x = F.silu(layer(x)) if name.endswith("norm") else layer(x)
        return x


def embedded(time: Tensor, width: int) -> Tensor:
    """Return sines and cosines `[b, width]` of times `[b]` at frequencies from 1 to 1/10000."""
    half = width // 2
    powers = torch.arange(half, device=time.device, dtype=time.dtype) / (half - 1)
    angles = time[:, None] * 10_000.0**-powers
    return torch.cat([angles.sin(), angles.cos()], 1)


def _encoder(s: SongSettings) -> tuple[nn.ModuleDict, list[int]]:
    """Return the way down, and how many channels each of its layers leaves."""
    layers: dict[str, nn.Module] = {}
    skips, inside = [s.width], s.width
    for level, multiple in enumerate(s.multiples):
        size, width = s.image_size >> level, s.width * multiple
        if level == 0:
            layers[f"{size}x{size}_conv"] = nn.Conv2d(s.channels, s.width, 3, padding=1)
        else:
            layers[f"{size}x{size}_down"] = Block(inside, inside, s.embedding, resample=0.5)
            skips.append(inside)
        for k in range(s.blocks):
            attends = level in s.attention
            layers[f"{size}x{size}_block{k}"] = Block(inside, width, s.embedding, attends=attends)
            inside = width
            skips.append(inside)
    return nn.ModuleDict(layers), skips


def _decoder(s: SongSettings, skips: list[int]) -> nn.ModuleDict:
    """Return the way up, whose blocks take in what the way down left."""
    layers: dict[str, nn.Module] = {}
    skips, inside = list(skips), s.width * s.multiples[-1]
    for level in reversed(range(len(s.multiples))):
        size, width = s.image_size >> level, s.width * s.multiples[level]
        if level == len(s.multiples) - 1:
            layers[f"{size}x{size}_in0"] = Block(inside, inside, s.embedding, attends=True)
            layers[f"{size}x{size}_in1"] = Block(inside, inside, s.embedding)
        else:
            layers[f"{size}x{size}_up"] = Block(inside, inside, s.embedding, resample=2.0)
        for k in range(s.blocks + 1):
            attends = level in s.attention and k == s.blocks
            joined = inside + skips.pop()
            layers[f"{size}x{size}_block{k}"] = Block(joined, width, s.embedding, attends=attends)
            inside = width
    layers[f"{s.image_size}x{s.image_size}_aux_norm"] = _norm(inside)
    layers[f"{s.image_size}x{s.image_size}_aux_conv"] = nn.Conv2d(inside, s.channels, 3, padding=1)
    return nn.ModuleDict(layers)


class Block(nn.Module):
    """A residual block that may halve or double its images, and attend to all of them.

    Args:
        inside, outside: channels before and after.
        embedding: channels of the noise level's embedding.
        resample: 0.5 or 2 to halve or double height and width.
        attends: whether attention follows.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        embedding: int,
        *,
        resample: float = 1.0,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm0, self.norm1 = _norm(inside), _norm(outside)
        self.conv0 = nn.Conv2d(inside, outside, 3, padding=1)
        self.affine = nn.Linear(embedding, outside)
        self.conv1 = nn.Conv2d(outside, outside, 3, padding=1)
        plain = inside == outside and resample == 1.0
        self.skip = None if plain else nn.Conv2d(inside, outside, 1)
        self.attends = attends
        if attends:
            self.norm2 = _norm(outside)
            self.qkv = nn.Conv2d(outside, 3 * outside, 1)
            self.proj = nn.Conv2d(outside, outside, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map `[b, inside, H, W]` to `[b, outside, H·resample, W·resample]`."""
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        h = self.conv1(F.silu(self.norm1(h + self.affine(embedding)[:, :, None, None])))
        x = self._resampled(x)
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return self._attended(x) if self.attends else x

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample < 1.0:
            return F.avg_pool2d(x, 2)
        return x if self.resample == 1.0 else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def _attended(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        # A channel's query, key and value lie beside each other.
        q, k, v = self.qkv(self.norm2(x)).view(b, c, 3, -1).unbind(2)
        weights = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(c)).softmax(2)
        seen = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, height, width)
        return (x + self.proj(seen)) * math.sqrt(0.5)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)
