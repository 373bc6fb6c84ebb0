"""Threat models: what an attacker may change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_defense.attacks.norms import NORMS, Bound, exact_dtype, norm_name, per_image
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, working_dtype

_SLACK = 1e-12
"""By what share float64's own rounding may miss eps, or a point of the lattice."""
_OFF_LATTICE = 1e-5
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
            x = origin.to(exact_dtype(origin))
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
        o = self._lattice(origin.to(exact_dtype(origin)))
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
        return NORMS[self.norm].size(x.to(exact_dtype(x)) - origin.to(exact_dtype(origin)))

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


def _next_towards(x: Tensor, origin: Tensor) -> Tensor:
    """Return the next numbers from x ≥ 0 towards `origin` ≥ 0, in their own dtype."""
    # Numbers from 0 on are ordered as their bits are, in half precision too.
    word = _WORDS[x.element_size()]
    return (x.view(word) + (origin - x).sign().to(word)).view(x.dtype)


def fraction(value: float) -> str:
    """Print a pixel distance as k/255 where that is exact, else as a decimal."""
    k = value * 255
    return f"{round(k)}/255" if round(k) and abs(k - round(k)) < 1e-9 else f"{value:g}"
