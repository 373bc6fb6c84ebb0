"""Hashes that tell models and images apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers, quantised and packed ones too."""
    return digest(v for _, v in sorted(model.state_dict().items()))


def digest(values: Iterable[Any]) -> str:
    """Return the SHA-256 of tensors, their types and shapes included, and of other state."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(str((value.dtype, tuple(value.shape))).encode())
        digest.update(raw_bytes(value))
    return digest.hexdigest()


def raw_bytes(value: Any) -> bytes:
    """Return what a state_dict's entry holds: a tensor's numbers, or those of all its parts."""
    if isinstance(value, Tensor):
        return (
            _numbers(value.detach())
            .cpu()
            .contiguous()
            .flatten()
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    if isinstance(value, Mapping):
        return b"".join(str(k).encode() + raw_bytes(v) for k, v in sorted(value.items(), key=str))
    if isinstance(value, tuple | list):
        return b"".join(raw_bytes(v) for v in value)
    if isinstance(value, bytes):
        return value
    plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
    return (repr(value) if plain else type(value).__name__).encode()


def _numbers(tensor: Tensor) -> Tensor:
    """Return a tensor of the same information whose bytes are plain numbers."""
    if tensor.is_quantized:
        # Scale and zero point count too: the same integers may stand for other numbers.
        return tensor.dequantize()
    return tensor.to_dense() if tensor.layout != torch.strided else tensor
