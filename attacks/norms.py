"""The geometry of each norm in which an attacker's change is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.noise import LACKS_64_BITS, KeyedNoise

_TINY = 1e-12
SPARSE_SHARE = 0.01
Bound = Tensor | float


class Norm(NamedTuple):
    """The geometry of one norm, on perturbations `[b, C, H, W]`.

    Attributes:
        size: ‖δ‖ `[b]`.
        project: δ, eps and a box `low ≤ 0 ≤ high` to a perturbation with ‖δ‖ ≤ eps in the box: the
            nearest one in Linf and L1, and in L2, as published, the nearest in the ball, clipped.
        steepest: a gradient, a step's length (one number or `[b, 1, 1, 1]`) and the room that
            every pixel has along the gradient, to a step of that norm along which it rises fastest.
        start: a random perturbation within eps.
        beyond: which pixels take a perturbation beyond eps, bool, to be broadcast to its shape;
            all of an image whose size is, unless given.
    """

    size: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float, Bound, Bound], Tensor]
    steepest: Callable[[Tensor, Bound, Tensor], Tensor]
    start: Callable[[Tensor, float, KeyedNoise], Tensor]
    beyond: Callable[[Tensor, float], Tensor] | None = None


def per_image(values: Tensor) -> Tensor:
    """Shape one value an image `[b]` to `[b, 1, 1, 1]`."""
    return values.view(-1, 1, 1, 1)


def _linf_project(delta: Tensor, eps: float, low: Bound, high: Bound) -> Tensor:
    return _clip(delta.clamp(-eps, eps), low, high)


def _linf_start(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    return (2.0 * noise.uniform(0, like) - 1.0) * eps


def _clip(delta: Tensor, low: Bound, high: Bound) -> Tensor:
    return delta.clamp(min=low).clamp(max=high)


def _l2_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_project(delta: Tensor, eps: float, low: Bound, high: Bound) -> Tensor:
    shrunk = delta * per_image((eps / _l2_size(delta).clamp_min(_TINY)).clamp(max=1.0))
    return _clip(shrunk, low, high)


def _l2_steepest(gradient: Tensor, size: Bound, room: Tensor) -> Tensor:
    # Scaled first, so that the squares of tiny gradients do not vanish.
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / per_image(gradient.flatten(1).abs().amax(1).clamp_min(tiny))
    return size * (scaled / per_image(_l2_size(scaled).clamp_min(_TINY)))


def _l2_start(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    return _l2_steepest(noise.normal(0, like), eps * noise.uniform(1, like[:, :1, :1, :1]), like)


def _l1_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).abs().sum(1)


def exact_dtype(x: Tensor) -> torch.dtype:
    """Return the precision in which x is projected: float64, where its device has it."""
    return torch.float32 if x.device.type in LACKS_64_BITS else torch.float64


def _l1_project(delta: Tensor, eps: float, low: Bound, high: Bound) -> Tensor:
    """Project onto the L1 ball within a box, exactly (Croce and Hein 2021, proposition 2.1).

    The nearest point takes λ ≥ 0 off every |δ_i| and caps the rest at the box's side; its norm
    falls piecewise linearly in λ, with kinks where a pixel leaves its cap and where it reaches 0.
    """
    # Thousands of pixels are summed, and the sum has to meet eps up to float32's rounding.
    size = delta.to(exact_dtype(delta)).flatten(1).abs()
    side = torch.where(delta > 0, torch.as_tensor(high), -torch.as_tensor(low))
    cap = side.to(delta).to(size.dtype).flatten(1)
    kept = (size - _shrinkage(size, cap, eps)[:, None]).clamp_min(0.0).minimum(cap)
    return delta.sign() * kept.view_as(delta).to(delta)


def _shrinkage(size: Tensor, cap: Tensor, eps: float) -> Tensor:
    """Return the least λ ≥ 0 `[b]` with Σ min(max(size − λ, 0), cap) ≤ eps."""
    kinks, order = torch.cat([(size - cap).clamp_min(0.0), size], dim=1).sort(dim=1)
    bends = torch.cat([torch.full_like(size, -1.0), torch.ones_like(size)], dim=1)
    slopes = bends.gather(1, order).cumsum(1)
    falls = (slopes[:, :-1] * kinks.diff(dim=1)).cumsum(1)
    total = size.minimum(cap).sum(1, keepdim=True)
    norms = torch.cat([total, total + falls], dim=1)
    # The last kink at which the norm is still above eps begins the piece that crosses it.
    piece = ((norms > eps).sum(1, keepdim=True) - 1).clamp_min(0)
    slope = slopes.gather(1, piece).clamp_max(-1.0)
    crossing = kinks.gather(1, piece) + (norms.gather(1, piece) - eps) / -slope
    return torch.where(total > eps, crossing, torch.zeros_like(crossing)).squeeze(1)


def _l1_steepest(gradient: Tensor, size: Bound, room: Tensor) -> Tensor:
    """Spend the step on the pixels of the largest slopes, as far as each has room.

    Exact in the box, but that no pixel may take more than its share if a hundredth of them were to
    move alike: one pixel all the way to white is no small step (Tramèr and Boneh 2019).
    """
    slopes, order = gradient.abs().flatten(1).sort(dim=1, descending=True)
    budget = (torch.ones_like(gradient[:, :1, :1, :1]) * size).flatten(1)
    share = budget / max(1, round(SPARSE_SHARE * slopes.shape[1]))
    most = room.flatten(1).gather(1, order).minimum(share) * (slopes > 0)
    spent = most.cumsum(1) - most
    moves = (budget - spent).clamp_min(0.0).minimum(most)
    return gradient.sign() * torch.zeros_like(moves).scatter(1, order, moves).view_as(gradient)


def _l1_start(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    signed = 2.0 * noise.uniform(0, like) - 1.0
    laplace = -signed.sign() * (-signed.abs()).log1p()
    direction = laplace / per_image(_l1_size(laplace).clamp_min(_TINY))
    return direction * noise.uniform(1, like[:, :1, :1, :1]) * eps


NORMS: dict[str, Norm] = {
    "Linf": Norm(
        size=lambda delta: delta.flatten(1).abs().amax(1),
        project=_linf_project,
        steepest=lambda gradient, size, room: size * gradient.sign(),
        start=_linf_start,
        beyond=lambda delta, eps: delta.abs() > eps,
    ),
    "L2": Norm(_l2_size, _l2_project, _l2_steepest, _l2_start),
    "L1": Norm(_l1_size, _l1_project, _l1_steepest, _l1_start),
}
"""Each norm by the name that settings know."""


def norm_name(name: str) -> str:
    """Return a norm's name as `NORMS` has it, whatever its case.

    Raises:
        UsageError: no such norm.
    """
    found = {known.lower(): known for known in NORMS}.get(str(name).lower())
    if found is None:
        raise UsageError(f"unknown norm {name!r}; choose one of {', '.join(NORMS)}.")
    return found
