"""What the Square attack proposes in each norm: a first perturbation, and changes in a square."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ebm_defense.noise import KeyedNoise

_TINY = 1e-12
Window = tuple[Tensor, Tensor, Tensor, Tensor]
"""A square of each image, in all channels: indices from `[b, C, H, W]` to `[b, C, side, side]`."""


class Proposals(NamedTuple):
    """The moves of one norm, on perturbations `[b, C, H, W]`.

    What they return may leave the ball by rounding and the box by far: it is to be projected.

    Attributes:
        first: a perturbation of the shape of the images, for eps and noise.
        change: a perturbation, changed in a window of this side, for eps, the draws' number and
            noise. Images alone decide on their windows, not their batch.
        least: the shortest side that was published.
        odd: whether sides are odd, as long as the image is as wide.
    """

    first: Callable[[Tensor, float, KeyedNoise], Tensor]
    change: Callable[[Tensor, int, float, int, KeyedNoise], Tensor]
    least: int
    odd: bool

    def side(self, size: int, height: int, width: int) -> int:
        """Return the side of a window nearest to `size` that may be and that the image has."""
        allowed = max(size, self.least)
        return min(allowed | 1 if self.odd else allowed, height, width)


def window(like: Tensor, side: int, draws: Tensor) -> Window:
    """Return the window whose corner two draws from [0, 1) `[b, 2]` choose, all alike likely."""
    count, channels, height, width = like.shape
    room = torch.tensor([height - side + 1, width - side + 1], device=draws.device)
    # Half precision may round a draw up to 1.
    corner = (draws * room).long().minimum(room - 1)
    place = corner[:, :, None] + torch.arange(side, device=draws.device)
    rows, columns = place.unbind(1)
    image = torch.arange(count, device=draws.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=draws.device).view(-1, 1, 1)
    return image, channel, rows[:, None, :, None], columns[:, None, None, :]


def _draws(like: Tensor, count: int, number: int, noise: KeyedNoise) -> Tensor:
    """Return `count` draws an image from [0, 1), then one a channel, `[b, count + C, 1, 1]`."""
    return noise.uniform(number, like.new_empty(len(like), count + like.shape[1], 1, 1))


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform)


def _stripes(like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
    """Return vertical stripes of ±eps, one sign a channel and column."""
    return eps * _signs(noise.uniform(0, like[:, :, :1, :])).expand_as(like)


def _square(delta: Tensor, side: int, eps: float, number: int, noise: KeyedNoise) -> Tensor:
    """Add ±2·eps in one window, one sign a channel (Andriushchenko et al. 2020, algorithm 2)."""
    draws = _draws(delta, 2, number, noise)
    inside = window(delta, side, draws[:, :2].flatten(1))
    changed = delta.clone()
    changed[inside] += 2.0 * eps * _signs(draws[:, 2:])
    return changed


class Mass(NamedTuple):
    """The moves of a norm whose budget is a sum over pixels: L2's of squares, L1's of sizes.

    A window is filled with a bump: a hill on one half, a hollow on the other, each of nested
    squares, the inner ones higher (Andriushchenko et al. 2020, section 3.3). A change gives one
    window the mass of two, and what the budget has left over.

    Attributes:
        power: of the norm, 2 or 1; the k-th nested square is `k ** -steepness` high.
        steepness: 2 in L2, 4 in L1 (AutoAttack).
        whole: whether the first perturbation and all its bumps together weigh eps, as in L2. In L1
            each bump weighs 1, and a change C times what its window may, for C channels: more
            than there is, of which the projection keeps the highest pixels.
    """

    power: int
    steepness: int
    whole: bool

    def first(self, like: Tensor, eps: float, noise: KeyedNoise) -> Tensor:
        """Return bumps a fifth of the image wide, as many as fit, one sign a bump and channel."""
        _, channels, height, width = like.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        draws = noise.uniform(0, like.new_empty(len(like), 1 + channels, down, across))
        bumps = self._bumps(side, draws[:, :1]) * _signs(draws[:, 1:, :, :, None, None])
        tiles = bumps.transpose(3, 4).flatten(4, 5).flatten(2, 3)
        above, left = (height - down * side) // 2, (width - across * side) // 2
        below, right = height - down * side - above, width - across * side - left
        delta = F.pad(tiles, (left, right, above, below))
        return eps * delta / self._size(delta, (1, 2, 3)) if self.whole else delta

    def change(
        self, delta: Tensor, side: int, eps: float, number: int, noise: KeyedNoise
    ) -> Tensor:
        """Move the mass of two windows into one, in a new shape (algorithm 3)."""
        draws = _draws(delta, 5, number, noise)
        into, out = (window(delta, side, draws[:, i : i + 2].flatten(1)) for i in (0, 2))
        shape = self._bumps(side, draws[:, 4:5])[:, :, 0, 0] * _signs(draws[:, 5:])
        shape = shape + delta[into] / self._size(delta[into])
        changed = delta.clone()
        changed[into] = changed[out] = 0.0
        share = self._share(delta, delta - changed, eps)
        changed[into] = share * shape / self._size(shape)
        return changed

    def _share(self, delta: Tensor, taken: Tensor, eps: float) -> Tensor:
        """Return the norm a channel `[b, C, 1, 1]` of what replaces `taken`, a part of `delta`."""
        channels = delta.shape[1]
        unused = (eps**self.power - self._mass(delta, (1, 2, 3))).clamp_min(0.0)
        share = (self._mass(taken, (2, 3)) + unused / channels) ** (1.0 / self.power)
        return share if self.whole else channels * share

    def _mass(self, delta: Tensor, over: tuple[int, ...]) -> Tensor:
        return (delta.abs() ** self.power).sum(over, keepdim=True)

    def _size(self, delta: Tensor, over: tuple[int, ...] = (-2, -1)) -> Tensor:
        return self._mass(delta, over) ** (1.0 / self.power) + _TINY

    def _bumps(self, side: int, draws: Tensor) -> Tensor:
        """Return a bump of norm 1 for each draw, upright or lying: `[*draws, side, side]`."""
        upright = bump(side, self.power, self.steepness).to(draws)
        return torch.where(draws[..., None, None] < 0.5, upright, upright.T)


@cache
def bump(side: int, power: int, steepness: int) -> Tensor:
    """Return a hill over a hollow, each of the same norm, together of norm 1, `[side, side]`."""
    half = side // 2
    hills = [hill(rows, side, steepness) for rows in (half, side - half)]
    scaled = [h / h.norm(p=power) if h.numel() else h for h in hills]
    both = torch.cat([scaled[0], -scaled[1]])
    return both / both.norm(p=power)


def hill(height: int, width: int, steepness: int) -> Tensor:
    """Return nested squares around the middle, the k-th of height `k ** -steepness`, summed."""
    rows, columns = (torch.arange(n) - n // 2 for n in (height, width))
    heights = torch.arange(1, max(height, width) // 2 + 2).double() ** -steepness
    covered = heights.flip(0).cumsum(0).flip(0)
    return covered[torch.maximum(rows.abs()[:, None], columns.abs())]


_L2 = Mass(power=2, steepness=2, whole=True)
_L1 = Mass(power=1, steepness=4, whole=False)

PROPOSALS: dict[str, Proposals] = {
    "Linf": Proposals(_stripes, _square, least=1, odd=False),
    "L2": Proposals(_L2.first, _L2.change, least=3, odd=True),
    "L1": Proposals(_L1.first, _L1.change, least=3, odd=True),
}
"""How Square moves, by norm: Andriushchenko et al. (2020) in Linf and L2, AutoAttack's version of
it in L1 (Croce and Hein 2021)."""
