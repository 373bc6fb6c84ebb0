"""Threat models: what an attacker may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise

_TINY = 1e-12


class Norm(NamedTuple):
    """The geometry of one norm, on perturbations `[b, C, H, W]`.

    Attributes:
        size: ‖δ‖ `[b]`.
        project: δ and eps to the nearest perturbation with ‖δ‖ ≤ eps.
        steepest: the direction of unit norm along which a gradient rises fastest.
        start: a random perturbation within eps.
    """

    size: Callable[[Tensor], Tensor]
    project: Callable[[Tensor, float], Tensor]
    steepest: Callable[[Tensor], Tensor]
    start: Callable[[Tensor, float, KeyedNoise], Tensor]


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _l2_size(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _l2_project(delta: Tensor, eps: float) -> Tensor:
    return delta * _per_image((eps / _l2_size(delta).clamp_min(_TINY)).clamp(max=1.0))


def _l2_steepest(gradient: Tensor) -> Tensor:
    # Scaled first, so that the squares of tiny gradients do not vanish.
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / _per_image(gradient.flatten(1).abs().amax(1).clamp_min(tiny))
    return scaled / _per_image(_l2_size(scaled).clamp_min(_TINY))


def _l2_start(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    direction = _l2_steepest(noise.normal(0, like))
    return direction * noise.uniform(1, like[:, :1, :1, :1]) * eps


def _linf_start(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    return (2.0 * noise.uniform(0, like) - 1.0) * eps


NORMS: dict[str, Norm] = {
    "Linf": Norm(
        size=lambda delta: delta.flatten(1).abs().amax(1),
        project=lambda delta, eps: delta.clamp(-eps, eps),
        steepest=torch.sign,
        start=_linf_start,
    ),
    "L2": Norm(_l2_size, _l2_project, _l2_steepest, _l2_start),
}


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Perturbations of at most `eps` in `norm` that keep every pixel in [0, 1].

    Attributes:
        norm: a name in `NORMS`: "Linf" or "L2".
        eps: the largest norm, above 0, in [0, 1] pixel units.

    Raises:
        UsageError: another norm, or eps ≤ 0.
    """

    norm: str = "Linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise UsageError(f"unknown norm {self.norm!r}; choose one of {', '.join(NORMS)}.")
        if not 0 < self.eps < float("inf"):
            raise UsageError(f"eps must be above 0, in [0, 1] pixel units, not {self.eps}.")

    def __str__(self) -> str:
        return f"{self.norm} {fraction(self.eps)}"

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Project x onto the eps-ball around `origin`, then clip to [0, 1]."""
        return (origin + NORMS[self.norm].project(x - origin, self.eps)).clamp(0.0, 1.0)

    def size(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return ‖x − origin‖ `[b]`."""
        return NORMS[self.norm].size(x - origin)

    def step(self, x: Tensor, origin: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Move x by `step_size` along the steepest direction, and project."""
        return self.project(x + step_size * NORMS[self.norm].steepest(gradient), origin)

    def random_start(self, origin: Tensor, noise: KeyedNoise) -> Tensor:
        """Draw a start: uniform in the Linf ball; in L2 a random direction × U[0, eps]."""
        return self.project(origin + NORMS[self.norm].start(origin, self.eps, noise), origin)


def fraction(value: float) -> str:
    """Print a pixel distance as k/255 where that is exact, else as a decimal."""
    k = value * 255
    return f"{round(k)}/255" if round(k) and abs(k - round(k)) < 1e-9 else f"{value:g}"
