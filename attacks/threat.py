"""Threat models: what an attacker may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.errors import UsageError
from ebm_defense.noise import KeyedNoise, working_dtype
from ebm_defense.numbers import plain_numbers

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


def _l1_project(delta: Tensor, eps: float, low: Bound, high: Bound) -> Tensor:
    """Project onto the L1 ball within a box, exactly (Croce and Hein 2021, proposition 2.1).

    The nearest point takes λ ≥ 0 off every |δ_i| and caps the rest at the box's side; its norm
    falls piecewise linearly in λ, with kinks where a pixel leaves its cap and where it reaches 0.
    """
    # Thousands of pixels are summed, and the sum has to meet eps up to float32's rounding.
    size = delta.double().flatten(1).abs()
    side = torch.where(delta > 0, torch.as_tensor(high), -torch.as_tensor(low))
    cap = side.to(delta).double().flatten(1)
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


@dataclass(frozen=True, kw_only=True)
class ThreatModel:
    """Perturbations of at most `eps` in `norm` that keep every pixel in [0, 1].

    Attributes:
        norm: a name in `NORMS`: "Linf", "L2" or "L1", in any case.
        eps: the largest norm, above 0, in [0, 1] pixel units; 0.03 or "8/255".
        bits: of the pixels, 1 to 8, if attacked images are to lie on the lattice of such images,
            so that a saved PNG (8 bits) is the image that was judged; the originals must lie on
            it. None for any pixel value.

    Raises:
        UsageError: another norm, bits out of range, or an eps that is not above 0 or, in Linf,
            above the box's side of 1.
    """

    norm: str = "Linf"
    eps: float = 8 / 255
    bits: int | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        object.__setattr__(self, "norm", norm_name(self.norm))
        if not 0 < self.eps < float("inf"):
            raise UsageError(f"eps must be above 0, in [0, 1] pixel units, not {self.eps}.")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise UsageError(f"bits must be from 1 to 8, not {self.bits}.")
        if self._longest(1) == self._longest(2):  # however many pixels there are
            self._refuse_beyond(1)

    def __str__(self) -> str:
        lattice = "" if self.bits is None else f" on {self.bits}-bit images"
        return f"{self.norm} {fraction(self.eps)}{lattice}"

    def check(self, origin: Tensor) -> None:
        """Refuse originals `[b, C, H, W]` that this threat model does not fit.

        Raises:
            UsageError: an eps beyond what the images' whole box allows, or, with `bits`, pixels
                off that lattice.
        """
        self._refuse_beyond(max(origin[:1].numel(), 1))
        if self.bits is not None:
            x = origin.to(_exact(origin))
            rounding = max(_OFF_LATTICE, torch.finfo(origin.dtype).eps)
            if bool(((x - self._lattice(x)).abs() > rounding).any()):
                raise UsageError(
                    f"with bits={self.bits} the images must lie on that lattice, in steps of "
                    f"1/{self._levels}; give 8-bit images divided by 255, not resized, or leave "
                    "bits out."
                )

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """Project x onto the part of the eps-ball around `origin` that lies in [0, 1].

        The result has the dtype of `origin` and keeps to eps in it exactly: it is rounded to the
        nearest number, or towards the original where that one is beyond eps. Gradients go through
        the rounding as they are.
        """
        o = self._lattice(origin.to(_exact(origin)))
        delta = NORMS[self.norm].project(x.to(o) - o, self.eps, -o, 1.0 - o)
        exact = (o + delta).clamp(0.0, 1.0)
        rounded = self._rounded(exact.detach(), o.detach(), origin.dtype)
        if not exact.requires_grad:
            return rounded
        plain = exact.to(origin.dtype)
        return plain + (rounded - plain).detach()

    def _rounded(self, exact: Tensor, origin: Tensor, dtype: torch.dtype) -> Tensor:
        """Round images within the threat model to the numbers that images may hold."""
        near, closer = self._neighbours(exact, origin, dtype)
        return torch.where(self._beyond(near.to(origin) - origin), closer, near).to(dtype)

    def size(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return ‖x − origin‖ `[b]`, without rounding in between."""
        return NORMS[self.norm].size(x.to(_exact(x)) - origin.to(_exact(origin)))

    def step(self, x: Tensor, origin: Tensor, gradient: Tensor, step_size: Bound) -> Tensor:
        """Move x by `step_size`, one number or `[b, 1, 1, 1]`, where the gradient rises fastest,
        and project.
        """
        x, gradient = (t.to(working_dtype(t.dtype)) for t in (x, gradient))
        room = torch.where(gradient > 0, 1.0 - x, x)
        return self.project(x + NORMS[self.norm].steepest(gradient, step_size, room), origin)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return a direction of unit norm along which the gradient rises fastest in free space."""
        gradient = gradient.to(working_dtype(gradient.dtype))
        return NORMS[self.norm].steepest(gradient, 1.0, torch.full_like(gradient, torch.inf))

    def random_start(self, origin: Tensor, noise: KeyedNoise) -> Tensor:
        """Draw a start: uniform in the Linf ball; in L2 and L1 a random direction × U[0, eps]."""
        like = origin.to(working_dtype(origin.dtype))
        return self.project(like + NORMS[self.norm].start(like, self.eps, noise), origin)

    @property
    def _levels(self) -> int:
        return 2 ** (self.bits or 0) - 1

    def _lattice(self, x: Tensor) -> Tensor:
        """Return the nearest point of the lattice, or x itself where there is none."""
        return x if self.bits is None else (x * self._levels).round() / self._levels

    def _neighbours(
        self, exact: Tensor, origin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the nearest numbers that images may hold, and those no further from `origin`."""
        if self.bits is None:
            near = exact.to(dtype)
            too_far = (near.to(exact) - origin).abs() > (exact - origin).abs()
            return near, torch.where(too_far, _next_towards(near, origin.to(dtype)), near)
        steps = exact * self._levels
        closer = torch.where(exact > origin, (steps + _SLACK).floor(), (steps - _SLACK).ceil())
        return steps.round() / self._levels, closer / self._levels

    def _beyond(self, delta: Tensor) -> Tensor:
        norm, most = NORMS[self.norm], self.eps * (1.0 + _SLACK)
        return norm.beyond(delta, most) if norm.beyond else per_image(norm.size(delta) > most)

    def _longest(self, pixels: int) -> float:
        """Return the longest perturbation in a box of so many pixels: from black to white."""
        return float(NORMS[self.norm].size(torch.ones((1, 1, 1, pixels))))

    def _refuse_beyond(self, pixels: int) -> None:
        most = self._longest(pixels)
        if self.eps > most:
            raise UsageError(
                f"eps {self.eps:g} in {self.norm} allows any image, since pixels lie in [0, 1] and "
                f"no two images are further apart than {most:.4g}; did you mean {self.eps:g}/255?"
            )


_SLACK = 1e-12
"""By what share float64's own rounding may miss eps, or a point of the lattice."""
_OFF_LATTICE = 1e-5
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def norm_name(name: str) -> str:
    """Return a norm's name as `NORMS` has it, whatever its case.

    Raises:
        UsageError: no such norm.
    """
    found = {known.lower(): known for known in NORMS}.get(str(name).lower())
    if found is None:
        raise UsageError(f"unknown norm {name!r}; choose one of {', '.join(NORMS)}.")
    return found


def _exact(x: Tensor) -> torch.dtype:
    """Return the precision in which x is projected."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # which has no float64


def _next_towards(x: Tensor, origin: Tensor) -> Tensor:
    """Return the next numbers from x ≥ 0 towards `origin` ≥ 0, in their own dtype."""
    # Numbers from 0 on are ordered as their bits are, in half precision too.
    word = _WORDS[x.element_size()]
    return (x.view(word) + (origin - x).sign().to(word)).view(x.dtype)


def fraction(value: float) -> str:
    """Print a pixel distance as k/255 where that is exact, else as a decimal."""
    k = value * 255
    return f"{round(k)}/255" if round(k) and abs(k - round(k)) < 1e-9 else f"{value:g}"
