"""Residual energies: SNGAN's discriminator as an energy, for images of 32 pixels and more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.energies.conv import make_activation
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers

LEAST_PIXELS = 4
"""Height and width that the last halving must leave."""


@dataclass(frozen=True, kw_only=True)
class ResidualEnergySettings:
    """The shape of a `ResidualEnergy`.

    Attributes:
        channels: image channels C.
        image_size: H = W in pixels; each of `halvings` halves it, to 4 pixels at least.
        width: channels of every layer (256 in EBM Life Cycle, 128 in PureGen).
        halvings: blocks that halve the image, at least 2; 2 for 32 pixels, 4 to 5 for 224.
        level: residual blocks after them that keep the size.
        activation: as `make_activation` takes it.

    Raises:
        UsageError: a setting out of range.
    """

    channels: int = 3
    image_size: int = 32
    width: int = 256
    halvings: int = 2
    level: int = 2
    activation: str = "relu"

    def __post_init__(self) -> None:
        plain_numbers(self)
        make_activation(self.activation)
        if min(self.channels, self.width) < 1 or self.halvings < 2 or self.level < 0:
            raise UsageError(
                "a residual energy needs channels ≥ 1, width ≥ 1, halvings ≥ 2 and level ≥ 0, not "
                f"{self}."
            )
        if self.image_size >> self.halvings < LEAST_PIXELS:
            raise UsageError(
                f"{self.halvings} halvings leave less than {LEAST_PIXELS} of {self.image_size} "
                "pixels; take fewer."
            )

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], name: str, image_size: int, activation: str = "relu"
    ) -> ResidualEnergySettings:
        """Read the shape off a state_dict, which errors call `name`; size and activation are asked.

        Raises:
            UsageError: weights of another architecture.
        """
        blocks = sorted({k.split(".")[0] for k in state if k.startswith("block")})
        halvings = sum(f"{b}.c_sc.weight" in state for b in blocks)
        if "block1.c1.weight" not in state or "l5.weight" not in state or halvings < 2:
            raise UsageError(
                f"{name} lacks block1.c1.weight, block2.c_sc.weight or l5.weight: these are no "
                "weights of a residual energy."
            )
        width, channels = state["block1.c1.weight"].shape[:2]
        return cls(
            channels=channels,
            image_size=image_size,
            width=width,
            halvings=halvings,
            level=len(blocks) - halvings,
            activation=activation,
        )


class Stem(nn.Module):
    """The first block: convolution, activation, convolution, halving; no activation before it."""

    def __init__(self, channels: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, width, 3, 1, 1)
        self.c2 = nn.Conv2d(width, width, 3, 1, 1)
        self.c_sc = nn.Conv2d(channels, width, 1)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.c2(self.activation(self.c1(x))), 2)
        return h + self.c_sc(F.avg_pool2d(x, 2))


class Block(nn.Module):
    """A pre-activation residual block, which halves the image or keeps it."""

    def __init__(self, width: int, activation: nn.Module, halves: bool) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(width, width, 3, 1, 1)
        self.c2 = nn.Conv2d(width, width, 3, 1, 1)
        if halves:
            self.c_sc = nn.Conv2d(width, width, 1)
        self.activation, self.halves = activation, halves

    def forward(self, x: Tensor) -> Tensor:
        h = self.c2(self.activation(self.c1(self.activation(x))))
        if not self.halves:
            return h + x
        return F.avg_pool2d(h, 2) + F.avg_pool2d(self.c_sc(x), 2)


class ResidualEnergy(nn.Module):
    """The residual energy of EBM Life Cycle (Hill et al. 2022), without any normalisation.

    A stem, blocks that halve the image, blocks that keep it, the mean over what is left, and one
    linear map without bias. The default settings have 4,204,800 parameters; with width 128 its keys
    (`block1.c1`, …, `l5.weight`) are PureGen's.
    """

    def __init__(self, settings: ResidualEnergySettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or ResidualEnergySettings()
        self.block1 = Stem(s.channels, s.width, make_activation(s.activation))
        self.blocks = [f"block{i}" for i in range(2, s.halvings + s.level + 1)]
        for i, name in enumerate(self.blocks, 2):
            self.add_module(name, Block(s.width, make_activation(s.activation), i <= s.halvings))
        self.activation = make_activation(s.activation)
        self.l5 = nn.Linear(s.width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` in [-1, 1] to energies `[N]`."""
        h = self.block1(x)
        for name in self.blocks:
            h = self.get_submodule(name)(h)
        return self.l5(self.activation(h).mean((2, 3))).reshape(x.shape[0])
