"""Hashes that tell models and images apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights and buffers."""
    return digest(v for _, v in sorted(model.state_dict().items()))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of tensors, their types and shapes included."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
