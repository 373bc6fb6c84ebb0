"""AdvGAN: a trained network makes the perturbation in one pass (Xiao et al. 2018)."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import tomli_w
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense.attacks.checks import check_replicates
from ebm_defense.attacks.external.one_shot import Crafted, OneShotAttack
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.storage.files import save_tensors, writable_folder, write_text
from ebm_defense.storage.serialize import from_plain
from ebm_defense.storage.state_dicts import load_weights

GENERATOR, SETTINGS = "generator.safetensors", "advgan.toml"
GROUPS = 4
CRAFT_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The shape of a `Generator`.

    Attributes:
        channels: image channels.
        width: channels of the first layer, a multiple of 4.
        blocks: residual blocks at the lowest resolution.
    """

    channels: int = 1
    width: int = 16
    blocks: int = 2

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.channels < 1 or self.blocks < 0 or self.width < GROUPS or self.width % GROUPS:
            raise UsageError(
                f"a generator needs channels ≥ 1, blocks ≥ 0 and a width that is a multiple of "
                f"{GROUPS}, not {self.channels}, {self.blocks} and {self.width}."
            )


def _layer(fan_in: int, width: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(fan_in, width, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, width), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1)
        self.branch = nn.Sequential(_layer(width, width), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Generator(nn.Module):
    """Maps images `[b, C, H, W]` of any height and width to raw perturbations of their shape.

    Twice down, residual blocks, twice up, as in the paper, with group normalisation, so that an
    image's perturbation does not depend on its batch.
    """

    def __init__(self, settings: GeneratorSettings) -> None:
        super().__init__()
        self.settings = s = settings
        self.first = _layer(s.channels, s.width)
        self.down = _layer(s.width, 2 * s.width, stride=2)
        self.deeper = _layer(2 * s.width, 4 * s.width, stride=2)
        self.blocks = nn.Sequential(*[_Residual(4 * s.width) for _ in range(s.blocks)])
        self.up = _layer(4 * s.width, 2 * s.width)
        self.higher = _layer(2 * s.width, s.width)
        self.last = nn.Conv2d(s.width, s.channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        whole = self.first(2.0 * images - 1.0)
        half = self.down(whole)
        inner = self.blocks(self.deeper(half))
        half = self.up(F.interpolate(inner, half.shape[-2:]))
        return self.last(self.higher(F.interpolate(half, whole.shape[-2:])))

    def unbounded(self, images: Tensor, threat: ThreatModel) -> Tensor:
        """Return perturbations with every pixel within eps, before they are projected."""
        return threat.eps * self(images).tanh()

    def perturb(self, images: Tensor, threat: ThreatModel) -> Tensor:
        """Return attacked images, within the threat model and differentiable."""
        return within(images, self.unbounded(images, threat), threat)

    def save(self, folder: str | Path) -> Path:
        """Write generator.safetensors and advgan.toml, which `load` reads."""
        path = writable_folder(folder)
        save_tensors(path / GENERATOR, self.state_dict())
        write_text(path / SETTINGS, tomli_w.dumps(dataclasses.asdict(self.settings)))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a generator that `save` wrote.

        Raises:
            UsageError: a file that is missing, damaged, or of another shape.
        """
        path = Path(folder).expanduser()
        file = path / SETTINGS
        if not file.is_file():
            raise UsageError(
                f"{path} holds no {SETTINGS}; name a folder that ebm-defense train-advgan wrote."
            )
        made = cls(from_plain(GeneratorSettings, _read(file), str(file)))
        load_weights(made, path / GENERATOR)
        return made.eval()


def within(images: Tensor, delta: Tensor, threat: ThreatModel) -> Tensor:
    """Return images + δ projected onto the threat model."""
    return threat.project(images + delta, images)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is damaged ({error}); train the generator again.") from error


@dataclass(frozen=True, kw_only=True)
class AdvGAN(OneShotAttack):
    """One pass of a generator that was trained against a defense (Xiao et al. 2018).

    Attributes:
        weights: a `Generator`, or the folder that `ebm-defense train-advgan` wrote.
        threat: what may change; perturbations are scaled to its eps and projected.
        replicates: purifications of each image before it is judged.

    Raises:
        UsageError: a folder that holds no generator, or replicates below 1.
    """

    weights: Generator | str | Path
    threat: ThreatModel = field(default_factory=ThreatModel)
    replicates: int = 15

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_replicates(self.replicates)
        if isinstance(self.weights, str | Path):
            object.__setattr__(self, "weights", Generator.load(self.weights))

    @property
    def name(self) -> str:
        return "AdvGAN"

    @property
    def direct(self) -> Self:
        return self

    @property
    def generator(self) -> Generator:
        """The generator itself."""
        assert isinstance(self.weights, Generator)
        return self.weights

    def craft(
        self,
        defense: PurifiedClassifier,
        images: Tensor,
        labels: Tensor,
        *,
        ids: Sequence[int],
        seed: int,
    ) -> Crafted:
        channels = self.generator.settings.channels
        if images.shape[1] != channels:
            raise UsageError(
                f"the generator was trained on images of {channels} channels, not "
                f"{images.shape[1]}."
            )
        generator = self.generator.to(images.device, torch.float32)
        with torch.no_grad():
            parts = [generator.perturb(x.float(), self.threat) for x in images.split(CRAFT_BATCH)]
        return Crafted(torch.cat(parts))
