"""Exact derivatives that keep no graph: one product at a time, in a stated precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRODUCT_PRECISIONS = ("fp32", "bf16")


def vjp(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """Return cotangentᵀ·∂function(x)/∂x, whatever grad mode the caller is in; no graph is kept."""
    with torch.inference_mode(False), torch.enable_grad():
        x = _leaf(x)
        return _gradient(function(x), x, cotangent)


def hessian_product(energy: Callable[[Tensor], Tensor], x: Tensor, vector: Tensor) -> Tensor:
    """Return ∇²U(x)·vector for each image, by double backward; zero where U has no curvature.

    Args:
        energy: maps `[b, C, H, W]` to `[b]`.
        x: `[b, C, H, W]`.
        vector: likewise.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = _leaf(x)
        value = energy(x)
        (slope,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=True)
        return _gradient(slope, x, vector)


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _gradient(value: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    gradient = None
    if value.requires_grad:
        cotangent = cotangent.clone() if cotangent.is_inference() else cotangent
        (gradient,) = torch.autograd.grad(value, x, cotangent, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in this precision, a name in `PRODUCT_PRECISIONS`, whatever the caller's autocast is.

    On a GPU "fp32" leaves out TF32, whose products keep only 10 bits.
    """
    reduced = precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=reduced), tf32(reduced, device):
        yield


@contextmanager
def tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Let CUDA round the factors of fp32 products to TF32, or not; leave other devices alone.

    torch's own default rounds those of convolutions but not those of matrix products.
    """
    if device.type != "cuda":
        yield
        return
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
