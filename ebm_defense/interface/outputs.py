"""Logits `[N, classes]` out of whatever a classifier returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.noise import working_dtype
from ebm_defense.runtime.memory import is_full

FIELD = "logits"


@contextmanager
def told(images: Tensor) -> Iterator[None]:
    """Say in one sentence what a model says of images that it cannot take.

    Raises:
        UsageError: in place of whatever the block raises, but that memory is full.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # a model is anybody's code, and may assert or raise anything
        if is_full(error):
            raise
        raise UsageError(
            f"the model cannot take images of shape {tuple(images.shape[1:])} and type "
            f"{images.dtype}: {reason(error)}{_layout(images)}."
        ) from error


def try_energy(energy: Callable[[Tensor], Tensor], images: Tensor) -> None:
    """Refuse images `[N, C, H, W]` in [0, 1] that an energy cannot take, before any long work.

    Raises:
        UsageError: what it says of the first of them.
    """
    device = next((w.device for m in modules_of(energy) for w in m.parameters()), images.device)
    with told(images), torch.no_grad(), in_eval_mode(modules_of(energy)):
        energy(images[:1].to(device) * 2.0 - 1.0)


def reason(error: Exception) -> str:
    """Return the first line of what an error says, or else its name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _layout(images: Tensor) -> str:
    last = images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3)
    return "; permute images [N, H, W, C] to [N, C, H, W]" if last else ""


def logits_of(output: Any, images: Tensor) -> Tensor:
    """Return the logits `[N, classes]` of a classifier's output, in float32 or float64.

    An object or a mapping is read by its `logits` (Hugging Face); any other mapping, a tuple or a
    list by the only entry that can be logits. A batch of one may have lost its axis, and trailing
    axes of length 1 are dropped. Logits in another dtype, such as autocast makes, are cast.

    Args:
        output: what the classifier returned.
        images: what it was given, `[N, C, H, W]`.

    Raises:
        UsageError: none or several entries can be logits.
    """
    logits = _shaped(_find(output, images), images)
    # A copy: a model may write its next answer over this one, and torch forbids to go on from what
    # was made under inference_mode inside it.
    logits = logits.dequantize() if logits.is_quantized else logits.clone()
    return logits.to(images.device, working_dtype(images.dtype))


def _find(output: Any, images: Tensor) -> Tensor:
    if isinstance(output, Tensor | np.ndarray):
        dense = torch.as_tensor(output)
        return dense if dense.layout == torch.strided else dense.to_dense()
    if isinstance(output, Mapping) and FIELD in output:
        return _find(output[FIELD], images)
    if hasattr(output, FIELD):
        return _find(getattr(output, FIELD), images)
    entries = _entries(output)
    found = [e for e in entries.values() if _may_be_logits(e, images)]
    if len(found) == 1:
        return torch.as_tensor(found[0])
    held = ", ".join(f"{name}: {_told(entry)}" for name, entry in entries.items())
    raise UsageError(
        f"the model returned {type(output).__name__}"
        + (f" ({held})" if held else "")
        + f", in which {len(found) or 'no'} entries may be the logits; it must return a tensor "
        "[N, classes], or wrap it to pick one."
    )


def _entries(output: Any) -> dict[str, Any]:
    if isinstance(output, Mapping):
        return {str(name): entry for name, entry in output.items()}
    if isinstance(output, tuple | list):
        return {str(i): entry for i, entry in enumerate(output)}
    return {}


def _may_be_logits(entry: Any, images: Tensor) -> bool:
    if not isinstance(entry, Tensor | np.ndarray):
        return False
    rows = len(images) == 1 and entry.ndim == 1 and len(entry) > 1
    return rows or (entry.ndim >= 2 and _flat(entry.shape) and entry.shape[0] == len(images))


def _flat(shape: tuple[int, ...]) -> bool:
    return shape[1] > 1 and all(size == 1 for size in shape[2:])


def _shaped(logits: Tensor, images: Tensor) -> Tensor:
    """Return logits as `[N, classes]`."""
    if logits.is_complex() or logits.dtype == torch.bool:
        raise UsageError(f"the model returned {logits.dtype}; it must return logits [N, classes].")
    if logits.ndim == 1 and len(images) == 1 and len(logits) > 1:
        logits = logits[None]
    if logits.ndim > 2 and _flat(tuple(logits.shape)):
        logits = logits.flatten(1)
    if logits.ndim != 2 or len(logits) != len(images):
        raise UsageError(
            f"the model returned an output of shape {tuple(logits.shape)} for {len(images)} "
            "images; it must return logits [N, classes]"
            + (", two columns where there are two classes." if logits.ndim < 2 else ".")
        )
    return logits


def _told(entry: Any) -> str:
    shape = getattr(entry, "shape", None)
    return type(entry).__name__ if shape is None else f"shape {tuple(shape)}"
