"""The map of an energy's basins: attraction-diffusion between minima, barriers, and their tree.

A chain that a target attracts tells two kinds of minima apart: those that it leaves for the target
at once lie in one basin, the others behind a barrier (Hill, Nijkamp, Zhu 2018, ADELM).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.engine import Energy, prepare
from ebm_defense.errors import UsageError
from ebm_defense.interface.numbers import plain_numbers
from ebm_defense.noise import KeyedNoise, chain_keys

GROWTH, SHRINKING = 1.2, 0.5
"""By what a descent's step changes after a step that lowered the energy, and after one that did
not."""
NODES, DENSER = 24, 4
"""Points of a path that is pulled taut, and between two of which its energy is looked at."""
MOVE = 0.1
"""How far such a point moves at a time, in distances between two of them."""
LOWERED = 0.97
"""By what the attraction is lowered in search of the weakest that succeeds."""


@dataclass(frozen=True, kw_only=True)
class Attraction:
    """A chain under U(x)/T + α·‖x − x*‖₂ (Hill, Nijkamp, Zhu 2018).

    Attributes:
        temperature: T > 0.
        alpha: α ≥ 0, the attraction.
        step_size: ε > 0 of x ← x − (ε²/2)·∇ + ε·z.
        reach: δ > 0, the distance from x* at which the chain has come there.
        patience: M ≥ 1, steps without coming nearer than ever before after which it has not.
        most: steps after which it has not either, ≥ 1.
        bound: states stay within [-bound, bound]; infinite for no bound.
    """

    temperature: float = 1.0
    alpha: float = 1.0
    step_size: float = 0.01
    reach: float = 0.1
    patience: int = 100
    most: int = 10_000
    bound: float = math.inf

    def __post_init__(self) -> None:
        plain_numbers(self)
        above = (self.temperature, self.step_size, self.reach, self.bound)
        if not (all(v > 0 for v in above) and self.alpha >= 0):
            raise UsageError(
                "temperature, step_size, reach and bound must be above 0 and alpha 0 or more, not "
                f"{', '.join(f'{v:g}' for v in (*above, self.alpha))}."
            )
        if min(self.patience, self.most) < 1:
            raise UsageError("patience and most must be at least 1 step.")


class Crossing(NamedTuple):
    """What became of chains `[b]`.

    Attributes:
        arrived: which came to their target, `[b]`.
        barrier: the highest U on their way, `[b]`.
        path: some states on the way, the first and the last included, `[n, b, …]`; a chain that
            ended early stays where it ended.
    """

    arrived: Tensor
    barrier: Tensor
    path: Tensor


def attract(
    energy: Energy, start: Tensor, target: Tensor, settings: Attraction, keys: Tensor
) -> Crossing:
    """Run chains from `start` that `target` attracts, both `[b, …]`, each by its own noise.

    Args:
        energy: maps `[b, …]` to `[b]`.
        start: where they begin.
        target: x* of each.
        settings: how they move and when they end.
        keys: of their noise, `[b]`.
    """
    gradient, s = prepare(energy, start, "fp32"), settings
    x, rows = start.detach().clone(), torch.arange(len(start), device=start.device)
    nearest = distance(x, target)
    stale = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    barrier = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    kept, thin = [x.clone()], max(1, s.most // (4 * NODES))
    for step in range(s.most):
        here, there = x[rows], target[rows]
        value, slope = gradient.with_energy(here)
        barrier[rows] = torch.maximum(barrier[rows], value.to(x.dtype))
        going = (nearest[rows] > s.reach) & (stale[rows] < s.patience)
        rows, here, there, slope = rows[going], here[going], there[going], slope[going]
        if not len(rows):
            break
        noise = KeyedNoise(keys[rows])
        x[rows] = _pulled(here, there, slope, noise.normal(step, here), s)
        away = distance(x[rows], there)
        nearer = away < nearest[rows]
        stale[rows] = torch.where(nearer, 0, stale[rows] + 1)
        nearest[rows] = torch.minimum(nearest[rows], away)
        if step % thin == 0:
            kept.append(x.clone())
    return Crossing(nearest <= s.reach, barrier, torch.stack([*kept, x]))


def _pulled(x: Tensor, target: Tensor, slope: Tensor, z: Tensor, s: Attraction) -> Tensor:
    towards = (x - target) / _like(distance(x, target).clamp_min(s.reach * 1e-3), x)
    drift = slope / s.temperature + s.alpha * towards
    return (x - 0.5 * s.step_size**2 * drift + s.step_size * z).clamp(-s.bound, s.bound)


def weakest_attraction(
    energy: Energy,
    start: Tensor,
    target: Tensor,
    settings: Attraction,
    *,
    trials: int = 20,
    seed: int = 0,
) -> float:
    """Return the lowest α at which a chain still comes from one state to another, of those tried.

    From `settings.alpha` α is lowered by 3% as long as one of the trials succeeds: the border of
    the metastable region of the (T, α) plane (Hill, Nijkamp, Zhu 2018). Infinite if not even the
    first succeeds.

    Args:
        energy: maps `[b, …]` to `[b]`.
        start: one state.
        target: one state.
        settings: the highest α among them.
        trials: chains for each α.
        seed: of their noise.
    """
    many = [trials, *[1] * start.ndim]
    starts, targets = (x[None].repeat(many) for x in (start, target))
    found, tried = math.inf, settings.alpha
    while tried > 0:
        keys = chain_keys(seed, f"attraction {tried!r}", range(trials), range(1))[0]
        now = replace(settings, alpha=tried)
        if not attract(energy, starts, targets, now, keys.to(start.device)).arrived.any():
            break
        found, tried = tried, tried * LOWERED
    return found


def minimise(
    energy: Energy,
    x: Tensor,
    *,
    steps: int = 1_000,
    rate: float = 0.01,
    bound: float = math.inf,
) -> Tensor:
    """Return where gradient descent from states `[b, …]` ends; each finds a step of its own.

    Args:
        energy: maps `[b, …]` to `[b]`.
        x: where to begin.
        steps: of the descent.
        rate: the first step, in units of the gradient.
        bound: states stay within [-bound, bound].
    """
    gradient = prepare(energy, x, "fp32")
    x = x.detach().clamp(-bound, bound)
    value, slope = gradient.with_energy(x)
    rates = torch.full_like(value, rate)
    for _ in range(steps):
        tried = (x - _like(rates, x) * slope).clamp(-bound, bound)
        lower, steeper = gradient.with_energy(tried)
        better = lower < value
        rates = rates * torch.where(better, GROWTH, SHRINKING)
        x = torch.where(_like(better, x), tried, x)
        slope = torch.where(_like(better, x), steeper, slope)
        value = torch.where(better, lower, value)
    return x


def distinct(x: Tensor, apart: float) -> tuple[Tensor, Tensor]:
    """Return the states of `[b, …]` that lie apart, and for each state the number of its own."""
    kept: list[int] = []
    own = []
    for i in range(len(x)):
        near = [
            k for k, j in enumerate(kept) if float(distance(x[i : i + 1], x[j : j + 1])) < apart
        ]
        own.append(near[0] if near else len(kept))
        kept.extend([] if near else [i])
    return x[kept], torch.tensor(own)


def taut(energy: Energy, path: Tensor, *, steps: int, bound: float = math.inf) -> Tensor:
    """Return the lowest barriers `[b]` on paths `[n, b, …]` that are pulled taut, ends held.

    The string method (E, Ren, Vanden-Eijnden 2002): points go down the energy and are spread evenly
    again. Any path's highest U bounds the barrier between its ends from above, so that the lowest
    that was seen is kept.
    """
    gradient = prepare(energy, path[0], "fp32")
    points = spread(path, NODES)
    lowest = _highest(energy, points)
    for _ in range(steps):
        inner = points[1:-1]
        slope = gradient(inner.flatten(0, 1)).view_as(inner)
        # Only the part across the path: along it the points are spread by hand.
        along = points[2:] - points[:-2]
        share = _dot(slope, along) / _dot(along, along).clamp_min(1e-30)
        slope = slope - _wide(share, slope) * along
        size = slope.flatten(2).norm(dim=2).amax(0).clamp_min(1e-30)
        gap = (points[1:] - points[:-1]).flatten(2).norm(dim=2).mean(0)
        moved = inner - _wide((MOVE * gap / size)[None], inner) * slope
        points = spread(torch.cat([points[:1], moved.clamp(-bound, bound), points[-1:]]), NODES)
        lowest = torch.minimum(lowest, _highest(energy, points))
    return lowest


def spread(path: Tensor, count: int) -> Tensor:
    """Return so many points evenly along polygons `[n, b, …]`, as `[count, b, …]`."""
    flat = path.flatten(2)
    lengths = (flat[1:] - flat[:-1]).norm(dim=2)
    along = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)])
    wanted = torch.linspace(0, 1, count, dtype=path.dtype, device=path.device)[:, None] * along[-1]
    after = torch.searchsorted(along.T.contiguous(), wanted.T.contiguous()).T
    after = after.clamp(1, len(path) - 1)
    low, high = (along.gather(0, at) for at in (after - 1, after))
    share = ((wanted - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
    index = after[..., None].expand(*after.shape, flat.shape[2])
    found = torch.lerp(flat.gather(0, index - 1), flat.gather(0, index), share[..., None])
    return found.view(count, *path.shape[1:])


def _highest(energy: Energy, points: Tensor) -> Tensor:
    """Return the highest U `[b]` on polygons, looked at between their points too."""
    dense = spread(points, DENSER * (len(points) - 1) + 1)
    with torch.no_grad():
        return energy(dense.flatten(0, 1)).view(dense.shape[:2]).amax(0)


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """Minima of an energy, and what lies between them.

    Attributes:
        minima: `[n, …]`.
        energies: U there, `[n]`.
        start: for each state that was given, the number of the minimum that it descends to.
        crossed: which chains came from a minimum (row) to another (column), `[n, n]`.
        barriers: the lowest U found over which one comes from one to another, `[n, n]`; infinite
            where no path was found, U itself on the diagonal.
    """

    minima: Tensor
    energies: Tensor
    start: Tensor
    crossed: Tensor
    barriers: Tensor

    @property
    def basins(self) -> list[list[int]]:
        """The minima by metastable basins: those that chains join either way."""
        joined = self.crossed & self.crossed.T
        return _components(joined.tolist())

    def tree(self) -> list[Merge]:
        """Return how basins of single minima join, the lowest barrier first (Becker, Karplus 1997).

        Minima between which no path was found stay apart.
        """
        n = len(self.minima)
        group = {i: [i] for i in range(n)}
        pairs = sorted((float(self.barriers[i, j]), i, j) for i in range(n) for j in range(i))
        home = {i: i for i in range(n)}
        merges: list[Merge] = []
        for height, i, j in pairs:
            one, other = home[i], home[j]
            if one == other or not math.isfinite(height):
                continue
            number = n + len(merges)
            group[number] = group[one] + group[other]
            home |= dict.fromkeys(group[number], number)
            merges.append(Merge(one, other, height, number))
        return merges


class Merge(NamedTuple):
    """Two basins that join over a barrier; `number` names what they become, leaves come first."""

    first: int
    second: int
    barrier: float
    number: int


def _components(joined: Sequence[Sequence[bool]]) -> list[list[int]]:
    """Return the connected components of a symmetric relation, each sorted, by their least."""
    left, found = set(range(len(joined))), []
    while left:
        todo, part = [min(left)], set()
        while todo:
            i = todo.pop()
            if i in part:
                continue
            part.add(i)
            todo.extend(j for j, yes in enumerate(joined[i]) if yes and j not in part)
        left -= part
        found.append(sorted(part))
    return found


def explore(
    energy: Energy,
    states: Tensor,
    settings: Attraction,
    *,
    descent: int = 1_000,
    rate: float = 0.01,
    apart: float | None = None,
    pulls: int = 200,
    trials: int = 1,
    batch: int = 100,
    seed: int = 0,
    progress: Callable[[float], object] = lambda share: None,
) -> Landscape:
    """Map an energy: minima from states, attraction-diffusion between each two, paths pulled taut.

    Args:
        energy: maps `[b, …]` to `[b]`, of images or of latent vectors.
        states: where descents begin, `[b, …]`.
        settings: of the chains between minima.
        descent: gradient steps to a minimum.
        rate: the descents' first step.
        apart: minima nearer to each other are one; `reach` if not given.
        pulls: steps in which paths are pulled taut; 0 for the chains' own barriers.
        trials: chains for each two minima and direction.
        batch: pairs of minima at a time.
        seed: of the chains' noise.
        progress: is told the share of chains that are done.
    """
    ends = minimise(energy, states, steps=descent, rate=rate, bound=settings.bound)
    minima, own = distinct(ends, settings.reach if apart is None else apart)
    couples = [(i, j) for j in range(len(minima)) for i in range(j)]
    pairs = [pair for pair in couples for _ in range(trials)]
    keys = chain_keys(seed, "attraction", range(2 * len(couples)), range(trials)).T.flatten()
    with torch.no_grad():
        energies = energy(minima)
    crossed = torch.eye(len(minima), dtype=torch.bool)
    barriers = torch.full((len(minima),) * 2, math.inf, dtype=minima.dtype)
    barriers.fill_diagonal_(0.0)
    barriers += torch.diag(energies.cpu().to(minima.dtype))
    for first in range(0, len(pairs), batch):
        rows = pairs[first : first + batch]
        both = keys[2 * first : 2 * (first + len(rows))]
        lowest, arrivals = _climbed(energy, minima, rows, both, settings, pulls)
        for (i, j), height, there, back in zip(rows, lowest, *arrivals, strict=True):
            barriers[i, j] = barriers[j, i] = min(float(barriers[i, j]), height)
            crossed[i, j] |= there
            crossed[j, i] |= back
        progress((first + len(rows)) / len(pairs))
    return Landscape(
        minima=minima, energies=energies, start=own, crossed=crossed, barriers=barriers
    )


def _climbed(
    energy: Energy,
    minima: Tensor,
    rows: list[tuple[int, int]],
    keys: Tensor,
    settings: Attraction,
    pulls: int,
) -> tuple[list[float], tuple[list[bool], list[bool]]]:
    """Return the lowest barrier found between each two minima, and who arrived there and back."""
    one, other = (minima[[pair[k] for pair in rows]] for k in (0, 1))
    keys = keys.to(one.device)
    there = attract(energy, one, other, settings, keys[: len(rows)])
    back = attract(energy, other, one, settings, keys[len(rows) :])
    # The highest U of a chain that did not arrive bounds nothing.
    heights = [torch.where(c.arrived, c.barrier, math.inf) for c in (there, back)]
    if pulls:
        path = torch.cat([one[None], there.path, other[None]])
        heights.append(taut(energy, path, steps=pulls, bound=settings.bound))
    return torch.stack(heights).amin(0).tolist(), (there.arrived.tolist(), back.arrived.tolist())


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return ‖x − y‖₂ of each two states, `[b]`."""
    return (x - y).flatten(1).norm(dim=1)


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value a state `[b]` as states `[b, …]` are."""
    return values.view(-1, *[1] * (x.ndim - 1))


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value a point `[n, b]` as points `[n, b, …]` are."""
    return values.view(*values.shape, *[1] * (x.ndim - 2))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(2).sum(2)
