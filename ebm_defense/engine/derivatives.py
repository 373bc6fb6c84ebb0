"""Exact derivatives that keep no graph: one product at a time, in a stated precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

from ebm_defense.engine.widened import widened

PRODUCT_PRECISIONS = ("fp32", "bf16")


def vjp(function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    """Return cotangentᵀ·∂function(x)/∂x, whatever grad mode the caller is in; no graph is kept."""
    return vjps(lambda xs: [function(xs[0])], [x], [cotangent])[0]


def vjps(
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    xs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor]:
    """Return `vjp` of a function of several tensors to several, one result for each of `xs`."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_leaf(x) for x in xs]
        pairs = zip(function(leaves), cotangents, strict=True)
        linked = [(value, _usable(g)) for value, g in pairs if value.requires_grad]
        if not linked:
            return [torch.zeros_like(x) for x in leaves]
        values, upstream = zip(*linked, strict=True)
        found = torch.autograd.grad(values, leaves, upstream, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def hessian_product(energy: Callable[[Tensor], Tensor], x: Tensor, vector: Tensor) -> Tensor:
    """Return ∇²U(x)·vector for each image, by double backward; zero where U has no curvature.

    Args:
        energy: maps `[b, C, H, W]` to `[b]`.
        x: `[b, C, H, W]`.
        vector: likewise.
    """
    wide = widened(energy, x)
    return hessian_products(lambda xs: wide(xs[0]), [x], 0, vector)[0]


def hessian_products(
    energy: Callable[[list[Tensor]], Tensor], xs: Sequence[Tensor], row: int, vector: Tensor
) -> list[Tensor]:
    """Return vectorᵀ·∂²U/∂x_row∂x_i for each of several tensors x_i that U depends on together.

    Args:
        energy: maps tensors `[b, …]` to `[b]`.
        xs: those tensors.
        row: the number of the one by which U is differentiated first.
        vector: of that one's shape.
    """
    with torch.inference_mode(False), torch.enable_grad():
        xs = [_leaf(x) for x in xs]
        with _FixedWeights():
            value = energy(xs)
        ones = torch.ones_like(value)
        (slope,) = torch.autograd.grad(value, xs[row], ones, create_graph=True)
        if not slope.requires_grad:
            return [torch.zeros_like(x) for x in xs]
        found = torch.autograd.grad(slope, xs, _usable(vector), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(xs, found, strict=True)]


class _Convolution(torch.autograd.Function):
    """A convolution of fixed weights, and of geometry (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.shape = geometry, x.shape
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _InputGradient.apply(grads[0], weight, ctx.geometry, ctx.shape), None, None, None


class _InputGradient(torch.autograd.Function):
    """The input gradient of `_Convolution`, linear in the output's."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, geometry: Any, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry
        return conv2d_input(shape, weight, g, *geometry)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return _Convolution.apply(grads[0], weight, None, ctx.geometry), None, None, None


class _FixedWeights(TorchFunctionMode):
    """While it is active, convolutions have no derivative by their weights.

    Torch's own double backward makes it even where nobody asks, a third of a product's arithmetic
    and, on a CPU, the slowest of it. Weights that depend on the images keep theirs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            x, weight, bias, geometry = _conv2d_arguments(*args, **(kwargs or {}))
            fixed = weight.is_leaf and (bias is None or bias.is_leaf)
            # Padding may be a word, and autocast casts the operands of calls that it knows.
            plain = x.ndim == 4 and not isinstance(geometry[1], str)
            if fixed and plain and not torch.is_autocast_enabled(x.device.type):
                return _Convolution.apply(x, weight, bias, geometry)
        return func(*args, **(kwargs or {}))


def _conv2d_arguments(
    input: Tensor,  # noqa: A002 - torch's own name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    return input, weight, bias, (stride, padding, dilation, groups)


def _leaf(x: Tensor) -> Tensor:
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_()


def _usable(cotangent: Tensor) -> Tensor:
    return cotangent.clone() if cotangent.is_inference() else cotangent


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

    torch's own default rounds those of convolutions but not those of matrix products. What it was
    told before is put back, in the older settings (`allow_tf32`) and the newer (`fp32_precision`).
    """
    if device.type != "cuda":
        yield
        return
    undo: list[tuple[Any, str, Any]] = []
    try:
        for switch, name, value in _rounding(allowed):
            before = getattr(switch, name)
            if before != value:
                undo.append((switch, name, before))
                setattr(switch, name, value)
        yield
    finally:
        for switch, name, before in reversed(undo):
            _put_back(switch, name, before)


def _rounding(allowed: bool) -> Iterator[tuple[Any, str, Any]]:
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        # The common one first: settings that nobody made follow it, and are left unmade.
        for switch in (cudnn, matmul, cudnn.conv):
            yield switch, "fp32_precision", "tf32" if allowed else "ieee"
    else:
        yield cudnn, "allow_tf32", allowed
        yield _MatmulPrecision(), "word", "high" if allowed else "highest"


class _MatmulPrecision:
    """The precision of matrix products before torch 2.9: of its three words, TF32 may be two."""

    @property
    def word(self) -> str:
        return torch.get_float32_matmul_precision()

    @word.setter
    def word(self, word: str) -> None:
        torch.set_float32_matmul_precision(word)


def _put_back(switch: Any, name: str, before: Any) -> None:
    if name == "fp32_precision":
        switch.fp32_precision = "none"  # so that what was only inherited is so again
    if getattr(switch, name) != before:
        setattr(switch, name, before)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let cuDNN choose its convolutions by their shapes alone, so that twice gives the same bits.

    Timing them (`benchmark`) or adding in any order would make a chain run again another chain.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
