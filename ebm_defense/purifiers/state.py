"""States of chains: a tensor, or tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebm_defense.engine.derivatives import vjps

State = Any
"""A tensor or a dict of tensors by name, each with a batch axis first."""


def tensors(state: State) -> list[Tensor]:
    """Return a state's tensors, those with names in the order of their names."""
    return [state] if isinstance(state, Tensor) else [state[name] for name in sorted(state)]


def rebuilt(like: State, parts: Sequence[Tensor]) -> State:
    """Return the state of the same names that is made of these tensors."""
    return parts[0] if isinstance(like, Tensor) else dict(zip(sorted(like), parts, strict=True))


def size(state: State) -> int:
    """Return the bytes that a state takes."""
    return sum(t.numel() * t.element_size() for t in tensors(state))


def lerp(start: State, end: State, weight: float) -> State:
    """Return start + weight·(end − start)."""
    pairs = zip(tensors(start), tensors(end), strict=True)
    return rebuilt(start, [a.lerp(b, weight) for a, b in pairs])


def equal(first: State, second: State) -> bool:
    """Whether two states are alike to the last bit, NaN counting as any other number."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def distance(first: State, second: State) -> float:
    """Return the largest difference between two states' numbers."""
    pairs = zip(tensors(first), tensors(second), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def state_vjp(function: Callable[[State], State], x: State, cotangent: State) -> State:
    """Return cotangentᵀ·∂function(x)/∂x, whatever grad mode the caller is in; no graph is kept."""
    found = vjps(lambda parts: tensors(function(rebuilt(x, parts))), tensors(x), tensors(cotangent))
    return rebuilt(x, found)
