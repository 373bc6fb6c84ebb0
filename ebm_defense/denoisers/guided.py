"""Files of guided-diffusion, read into diffusers' U-Net."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from ebm_defense.denoisers.unet import UNetDenoiser, UNetSettings
from ebm_defense.errors import UsageError
from ebm_defense.storage.state_dicts import load_into

State = Mapping[str, Tensor]
GROUPS, HEAD = 32, 64
"""Of group normalisation, and channels of a head of attention, as published."""
SIZE = re.compile(r"(\d+)x\1")
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
"""Parts of a residual block in guided-diffusion, and in diffusers."""
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class Shape(NamedTuple):
    """How a network is laid out: resolutions, and residual blocks each."""

    levels: int
    blocks: int


def is_guided(state: State) -> bool:
    """Whether weights are of guided-diffusion's network."""
    return "time_embed.0.weight" in state and "input_blocks.0.0.weight" in state


def read_guided(
    state: State, source: str, *, image_size: int = 0, head_channels: int = HEAD
) -> UNetDenoiser:
    """Read a network of guided-diffusion: linear noise of 1,000 levels, the noise predicted.

    Args:
        state: its weights.
        source: what errors call them; a size in it, as in 256x256_diffusion_uncond.pt, is that of
            the images.
        image_size: height and width of its images, if the name does not say it.
        head_channels: channels of a head of attention.

    Raises:
        UsageError: a class-conditional network, an unknown size, or weights that are not whole.
    """
    if any(key.startswith("label_emb") for key in state):
        raise UsageError(f"{source} is class-conditional; only unconditional networks purify here.")
    named = SIZE.search(source)
    size = image_size or int(named.group(1) if named else 0)
    if not size:
        raise UsageError(f"{source} does not say how large its images are; give image_size.")
    shape = _shape(state, source)
    denoiser = UNetDenoiser(_settings(state, shape, size, head_channels, source))
    load_into(denoiser.unet, dict(_renamed(state, shape, head_channels)), source)
    return denoiser


def _shape(state: State, source: str) -> Shape:
    """Read how many resolutions there are off the blocks that double them."""
    outputs = _count(state, "output_blocks")
    doubling = [k for k in range(outputs) if _last(state, f"output_blocks.{k}") is not None]
    blocks = doubling[0] if doubling else outputs - 1
    if outputs != _count(state, "input_blocks") or outputs % (blocks + 1):
        raise UsageError(f"{source} is laid out in no way that guided-diffusion has.")
    return Shape(outputs // (blocks + 1), blocks)


def _count(state: State, side: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{side}.")})


def _last(state: State, block: str) -> str | None:
    """Return the place in an output block of what doubles the resolution, if something does."""
    for place in (f"{block}.1", f"{block}.2"):
        if any(f"{place}.{part}.weight" in state for part in ("conv", "in_layers.0")):
            return place
    return None


def _settings(state: State, shape: Shape, size: int, head: int, source: str) -> UNetSettings:
    firsts = [f"input_blocks.{1 + level * (shape.blocks + 1)}" for level in range(shape.levels)]
    widths = tuple(state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts)
    attends = [f"{first}.1.qkv.weight" in state for first in firsts]
    for width, has in zip((*widths, widths[-1]), (*attends, True), strict=True):
        if has and width % head:
            raise UsageError(
                f"{source} has attention on {width} channels, which are no heads of {head}; give "
                "head_channels."
            )
    resized = "conv" if any(".0.op." in key for key in state) else "resnet"
    plain = "Resnet{0}sampleBlock2D" if resized == "resnet" else "{0}Block2D"
    down = tuple("AttnDownBlock2D" if a else plain.format("Down") for a in attends)
    up = tuple("AttnUpBlock2D" if a else plain.format("Up") for a in attends[::-1])
    wide = state["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    return UNetSettings(
        channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=state["out.2.weight"].shape[0],
        image_size=size,
        block_out_channels=widths,
        layers_per_block=shape.blocks,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=head,
        norm_num_groups=GROUPS,
        attn_norm_num_groups=GROUPS,
        resnet_time_scale_shift="scale_shift" if wide else "default",
        downsample_type=resized,
        upsample_type=resized,
    )


def _renamed(state: State, shape: Shape, head: int) -> Iterator[tuple[str, Tensor]]:
    """Yield guided-diffusion's weights under diffusers' names."""
    for theirs, ours in _places(state, shape):
        for part, new in RESIDUAL.items():
            yield from _pair(state, f"{theirs}.{part}", f"{ours}.{new}")
        for part in ("op", "conv"):
            yield from _pair(state, f"{theirs}.{part}", f"{ours}.conv")
        if f"{theirs}.qkv.weight" in state:
            yield from _attention(state, theirs, ours, head)
    for theirs, ours in ENDS.items():
        yield from _pair(state, theirs, ours)


def _places(state: State, shape: Shape) -> Iterator[tuple[str, str]]:
    """Yield where each block, attention or resizing lies in guided-diffusion, and in diffusers."""
    group = shape.blocks + 1
    for level in range(shape.levels):
        for k in range(shape.blocks):
            theirs = f"input_blocks.{1 + level * group + k}"
            yield f"{theirs}.0", f"down_blocks.{level}.resnets.{k}"
            yield f"{theirs}.1", f"down_blocks.{level}.attentions.{k}"
        yield f"input_blocks.{(level + 1) * group}.0", f"down_blocks.{level}.downsamplers.0"
        for k in range(group):
            theirs = f"output_blocks.{level * group + k}"
            yield f"{theirs}.0", f"up_blocks.{level}.resnets.{k}"
            last = _last(state, theirs)
            if last != f"{theirs}.1":
                yield f"{theirs}.1", f"up_blocks.{level}.attentions.{k}"
            if last:
                yield last, f"up_blocks.{level}.upsamplers.0"
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"


def _pair(state: State, theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        if f"{theirs}.{kind}" in state:
            yield f"{ours}.{kind}", state[f"{theirs}.{kind}"]


def _attention(state: State, theirs: str, ours: str, head: int) -> Iterator[tuple[str, Tensor]]:
    """Yield attention's weights; each head has its queries, keys and values one after another."""
    yield from _pair(state, f"{theirs}.norm", f"{ours}.group_norm")
    for kind in ("weight", "bias"):
        whole = state[f"{theirs}.qkv.{kind}"]
        parts = whole.reshape(-1, 3, head, *whole.shape[1:2])
        for k, name in enumerate(("to_q", "to_k", "to_v")):
            yield f"{ours}.{name}.{kind}", parts[:, k].flatten(0, 1)
        out = state[f"{theirs}.proj_out.{kind}"]
        yield f"{ours}.to_out.0.{kind}", out[..., 0] if kind == "weight" else out
