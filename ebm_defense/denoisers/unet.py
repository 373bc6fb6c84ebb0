"""diffusers' U-Net, and its schedule: the one place that knows diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ebm_defense._torchvision import torchvision
from ebm_defense.denoisers.base import PREDICTIONS, Denoiser, cumulative, noise_in
from ebm_defense.denoisers.schedules import betas
from ebm_defense.energies.conv import channels_last
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.runtime.optional import optional
from ebm_defense.storage.serialize import from_plain

RENAMED = {"channels": "in_channels", "image_size": "sample_size"}
SCHEDULE = {
    "schedule": "beta_schedule",
    "levels": "num_train_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
    "prediction": "prediction_type",
}
"""Settings by the names that diffusers gives them in a scheduler's file."""
NONE = ("attention_head_dim", "attn_norm_num_groups")
"""Settings of which 0 is diffusers' None."""
REFUSED = ("class_embed_type", "num_class_embeds", "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True, kw_only=True)
class UNetSettings:
    """A `UNet2DModel` and its schedule, by diffusers' names and with its defaults.

    Attributes:
        channels: of the images.
        image_size: their height and width.
        patch: so many pixels square are the channels of one of the network's; 1 for diffusers'.
        schedule, levels, beta_start, beta_end: the noise; see `schedules.SCHEDULES`.
        prediction: what the network tells, one of `PREDICTIONS`.
        the rest: of `UNet2DModel`; 0 where diffusers has None.
    """

    channels: int = 3
    image_size: int = 32
    patch: int = 1
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    down_block_types: tuple[str, ...] = ("DownBlock2D", *["AttnDownBlock2D"] * 3)
    up_block_types: tuple[str, ...] = (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    layers_per_block: int = 2
    attention_head_dim: int = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int = 0
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    time_embedding_type: str = "positional"
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    resnet_time_scale_shift: str = "default"
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    mid_block_scale_factor: float = 1.0
    add_attention: bool = True
    center_input_sample: bool = False
    dropout: float = 0.0
    schedule: str = "linear"
    levels: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.prediction not in PREDICTIONS:
            raise UsageError(
                f"the prediction is {self.prediction!r}; choose one of {', '.join(PREDICTIONS)}."
            )
        if self.patch < 1 or self.image_size % self.patch:
            raise UsageError(f"{self.image_size} pixels are no patches of {self.patch}.")
        inside = self.channels * self.patch**2
        if self.out_channels not in (inside, 2 * inside):
            raise UsageError(
                f"a denoiser of {inside} channels answers with as many, or twice as many with a "
                f"variance, not with {self.out_channels}."
            )

    @classmethod
    def of(
        cls, config: Mapping[str, Any], scheduler: Mapping[str, Any], source: str
    ) -> UNetSettings:
        """Read them off diffusers' files, config.json and scheduler_config.json.

        Raises:
            UsageError: of another model, or what is not supported here.
        """
        for name in REFUSED:
            if (config.get(name) or scheduler.get(name)) is not None:
                raise UsageError(
                    f"{source} has a {name}; only unconditional UNet2DModels with one of the named "
                    "noise schedules purify here."
                )
        fields = {f.name for f in dataclasses.fields(cls)} - {*SCHEDULE, *RENAMED}
        shape = {k: config[k] for k in fields if k in config}
        noise = {k: scheduler[v] for k, v in SCHEDULE.items() if v in scheduler}
        plain = {k: 0 if v is None and k in NONE else v for k, v in (shape | noise).items()}
        patch = config.get("patch", 1)
        plain |= {k: config[name] for k, name in RENAMED.items() if name in config}
        if {*RENAMED} <= {*plain}:
            plain["channels"] //= patch**2
            plain["image_size"] *= patch
        return from_plain(cls, plain, source)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `UNet2DModel`."""
        plain = {k: v for k, v in vars(self).items() if k not in (*SCHEDULE, *RENAMED, "patch")}
        inside = {
            "in_channels": self.channels * self.patch**2,
            "sample_size": self.image_size // self.patch,
        }
        return inside | {k: None if v == 0 and k in NONE else v for k, v in plain.items()}

    @property
    def scheduler(self) -> dict[str, Any]:
        """What a scheduler's file says of the noise."""
        return {name: getattr(self, key) for key, name in SCHEDULE.items()}


class UNetDenoiser(Denoiser):
    """A `UNet2DModel` of diffusers.

    Args:
        settings: of the network and its noise.

    Raises:
        UsageError: diffusers is not installed, or has no such network.
    """

    def __init__(self, settings: UNetSettings) -> None:
        super().__init__()
        self.settings = settings
        noise = betas(settings.schedule, settings.levels, settings.beta_start, settings.beta_end)
        self.alphas = cumulative(noise)
        self.unet = make_unet(settings.config)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(x, self.settings.patch)
        told = self.unet(folded.to(self.unet.dtype), level).sample[:, : folded.shape[1]]
        unfolded = F.pixel_shuffle(told.to(x.dtype), self.settings.patch)
        return noise_in(unfolded, x, self.alpha(level, x), self.settings.prediction)


def make_unet(config: Mapping[str, Any]) -> Any:
    """Return diffusers' `UNet2DModel` of these arguments.

    Raises:
        UsageError: diffusers is not installed, or they do not fit.
    """
    torchvision("transforms")  # which diffusers imports itself, and cannot everywhere
    unets = optional("diffusers.models.unets.unet_2d", "diffusers", "diffusion")
    try:
        made: nn.Module = unets.UNet2DModel(**config)
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"diffusers has no such UNet2DModel: {error}") from error
    # As weights from a folder are laid out: a convolution rounds differently in another layout.
    return channels_last(made.eval())
