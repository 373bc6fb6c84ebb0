"""Files of score_sde and of EDM, read into a `SongDenoiser`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ebm_defense.denoisers.song import Block, SongDenoiser, SongNet, SongSettings
from ebm_defense.errors import UsageError
from ebm_defense.storage.state_dicts import load_into

State = Mapping[str, Tensor]
MODULES = "all_modules."
CONV = re.compile(r"enc\.(\d+)x\1_conv\.weight")
BLOCK = re.compile(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight")
FOREIGN = {
    "map_label": "class-conditional",
    "aux_residual": "NCSN++",
    "aux_skip": "NCSN++",
    "map_noise.freqs": "NCSN++",
    "out_norm": "ADM",
}
"""What parts of keys tell that a network of EDM is no unconditional DDPM++."""
NAMES = {
    "GroupNorm_0.": "norm0.",
    "Conv_0.": "conv0.",
    "Dense_0.": "affine.",
    "GroupNorm_1.": "norm1.",
    "Conv_1.": "conv1.",
    "Conv_2.": "skip.",
}
"""Parts of a residual block in score_sde, and here."""
LEFT_OUT = ("resample_filter", "map_augment.weight")
"""Filters that are means of 2 × 2 pixels, and what only augmented images need."""


def is_edm(state: State) -> bool:
    """Whether weights are of EDM's network."""
    return any(CONV.search(key) for key in state)


def read_edm(
    state: State, source: str, *, preconditioning: str = "edm", **settings: Any
) -> SongDenoiser:
    """Read a network of EDM that was saved as a state_dict, with whatever prefix.

    Args:
        state: its weights.
        source: what errors call them.
        preconditioning: that it was learned with, "edm" or "vp".
        **settings: nothing else: the keys tell all.

    Raises:
        UsageError: a network that is no unconditional DDPM++, or weights that are not whole.
    """
    _refuse_settings(settings, source)
    first = next(key for key in state if CONV.search(key))
    prefix = first[: first.index("enc.")]
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    for word, kind in FOREIGN.items():
        if any(word in key for key in state):
            raise UsageError(
                f"{source} holds an EDM network that is {kind}; only unconditional DDPM++ networks "
                "of EDM purify here."
            )
    kept = {k: v for k, v in state.items() if not k.endswith(LEFT_OUT)}
    denoiser = SongDenoiser(_of_edm(kept, preconditioning))
    load_into(denoiser.net, kept, source)
    return denoiser.eval()


def _of_edm(state: State, preconditioning: str) -> SongSettings:
    """Read a network's settings off EDM's keys and shapes."""
    conv = next(key for key in state if CONV.match(key))
    width, channels = state[conv].shape[:2]
    blocks = [(int(m[1]), int(m[2]), k) for k in state if (m := BLOCK.match(k))]
    sizes = sorted({size for size, _, _ in blocks}, reverse=True)
    last = {size: max(k for s, k, _ in blocks if s == size) for size in sizes}
    return SongSettings(
        channels=channels,
        image_size=sizes[0],
        width=width,
        multiples=tuple(
            state[f"enc.{s}x{s}_block{last[s]}.conv0.weight"].shape[0] // width for s in sizes
        ),
        blocks=last[sizes[0]] + 1,
        attention=tuple(
            i for i, s in enumerate(sizes) if f"enc.{s}x{s}_block0.qkv.weight" in state
        ),
        embedding=state["map_layer0.weight"].shape[0],
        preconditioning=preconditioning,
    )


def is_score_sde(content: Any) -> bool:
    """Whether what a file held is a checkpoint of score_sde, or its model alone."""
    model = content.get("model", content) if isinstance(content, Mapping) else {}
    return isinstance(model, Mapping) and any(MODULES in str(key) for key in model)


def read_score_sde(
    content: Mapping[str, Any], source: str, *, image_size: int = 32, **settings: Any
) -> SongDenoiser:
    """Read a checkpoint of score_sde, its running average where it has one.

    Args:
        content: `model` by name, and `ema` with the ordered list `shadow_params`.
        source: what errors call it.
        image_size: height and width of its images, which shapes do not tell.
        **settings: nothing else.

    Raises:
        UsageError: an average that does not fit the model, or a network that is no DDPM++.
    """
    _refuse_settings(settings, source)
    model = content.get("model", content)
    named = {k: v for k, v in model.items() if MODULES in k}
    named = {k[k.index(MODULES) + len(MODULES) :]: v for k, v in named.items()}
    shadow = content.get("ema", {}).get("shadow_params")
    state = named if shadow is None else _averaged(named, shadow, source)
    denoiser = SongDenoiser(_of_score_sde(state, image_size, source))
    load_into(denoiser.net, dict(_renamed(denoiser.net, state, source)), source)
    return denoiser.eval()


def _averaged(named: State, shadow: Any, source: str) -> dict[str, Tensor]:
    """Return the running average by the model's names, whose order it has."""
    if not isinstance(shadow, list) or len(shadow) != len(named):
        raise UsageError(
            f"{source} holds an average of {len(shadow)} weights for a model of {len(named)}."
        )
    for (name, value), average in zip(named.items(), shadow, strict=True):
        if value.shape != average.shape:
            raise UsageError(
                f"{source} holds an average of shape {tuple(average.shape)} where the model's "
                f"{name} has {tuple(value.shape)}."
            )
    return dict(zip(named, shadow, strict=True))


def _refuse_settings(settings: Mapping[str, Any], source: str) -> None:
    if settings:
        raise UsageError(f"{source} tells all else of itself; leave {', '.join(settings)} out.")


def _of_score_sde(state: State, image_size: int, source: str) -> SongSettings:
    """Read a network's settings off the order of its modules."""
    kinds = [_kind(state, n) for n in range(1 + max(int(key.split(".")[0]) for key in state))]
    if kinds[:3] != ["linear", "linear", "conv"] or kinds[-2:] != ["norm", "conv"]:
        raise UsageError(f"{source} holds a network of score_sde that is no DDPM++.")
    ends = [n for n, kind in enumerate(kinds) if kind == "resample"]
    levels = len(ends) // 2 + 1
    blocks = (kinds.count("block") - 2 - levels) // (2 * levels)
    starts = [3, *(end + 1 for end in ends[: levels - 1])]
    width, channels = state["2.weight"].shape[:2]
    return SongSettings(
        channels=channels,
        image_size=image_size,
        width=width,
        multiples=tuple(state[f"{start}.Conv_0.weight"].shape[0] // width for start in starts),
        blocks=blocks,
        attention=tuple(i for i, n in enumerate(starts) if kinds[n + 1] == "attention"),
        embedding=state["0.weight"].shape[0],
    )


def _kind(state: State, n: int) -> str:
    """Return what a module of score_sde is, by its weights."""
    if f"{n}.NIN_0.W" in state:
        return "attention"
    conv = state.get(f"{n}.Conv_0.weight")
    if conv is not None:
        same = conv.shape[0] == conv.shape[1]
        return "resample" if same and f"{n}.Conv_2.weight" in state else "block"
    weight = state.get(f"{n}.weight")
    return {1: "norm", 2: "linear", 4: "conv"}.get(0 if weight is None else weight.ndim, "unknown")


def _renamed(net: SongNet, state: State, source: str) -> Iterator[tuple[str, Tensor]]:
    """Yield score_sde's weights under the names of a `SongNet`, whose order they have."""
    numbers = count()
    for name, layer in _layers(net):
        n = next(numbers)
        named = NAMES if isinstance(layer, Block) else {"": ""}
        for theirs, ours in named.items():
            for kind in ("weight", "bias"):
                key = f"{n}.{theirs}{kind}"
                if key in state:
                    yield f"{name}.{ours}{kind}", state[key]
        if isinstance(layer, Block) and layer.attends:
            yield from _attention(name, next(numbers), state, source)


def _layers(net: SongNet) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network's layers in the order of score_sde's modules."""
    yield from (("map_layer0", net.map_layer0), ("map_layer1", net.map_layer1))
    for side in ("enc", "dec"):
        for name, layer in net.get_submodule(side).named_children():
            yield f"{side}.{name}", layer


def _attention(name: str, n: int, state: State, source: str) -> Iterator[tuple[str, Tensor]]:
    """Yield attention's weights; a channel's query, key and value come to lie beside each other."""
    try:
        parts = [(state[f"{n}.NIN_{k}.W"].T, state[f"{n}.NIN_{k}.b"]) for k in range(4)]
        norm = {kind: state[f"{n}.GroupNorm_0.{kind}"] for kind in ("weight", "bias")}
    except KeyError as error:
        raise UsageError(f"{source} lacks {error} of a DDPM++ network.") from error
    weights, biases = zip(*parts, strict=True)
    yield f"{name}.norm2.weight", norm["weight"]
    yield f"{name}.norm2.bias", norm["bias"]
    yield f"{name}.qkv.weight", torch.stack(weights[:3], 1).flatten(0, 1)[..., None, None]
    yield f"{name}.qkv.bias", torch.stack(biases[:3], 1).flatten()
    yield f"{name}.proj.weight", weights[3][..., None, None]
    yield f"{name}.proj.bias", biases[3]
