"""The map of a two-dimensional mixture, held against a grid on which every barrier can be read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ebm_defense.errors import UsageError
from ebm_defense.landscape import (
    Attraction,
    Landscape,
    attract,
    distinct,
    explore,
    minimise,
    spread,
    taut,
    weakest_attraction,
)
from ebm_defense.noise import chain_keys

CENTRES = torch.tensor([[-1.0, -0.6], [0.9, -0.9], [1.0, 0.9], [-0.5, 1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)
WIDTHS = torch.tensor([0.35, 0.4, 0.3, 0.38], dtype=torch.float64)


class Mixture(nn.Module):
    """−log of a mixture of Gaussians in the plane, of states `[b, 2]` or images `[b, 2, 1, 1]`."""

    def forward(self, x):
        away = (x.flatten(1)[:, None] - CENTRES).square().sum(2)
        parts = -away / (2 * WIDTHS**2) - 2 * WIDTHS.log() + WEIGHTS.log()
        return -parts.logsumexp(1)


GRID = torch.linspace(-2, 2, 321, dtype=torch.float64)
PLANE = torch.stack(torch.meshgrid(GRID, GRID, indexing="ij"), -1).view(-1, 2)


@pytest.fixture(scope="module")
def truth():
    """Return the grid's minima, and the height at which flooding it joins each two of them."""
    heights = Mixture()(PLANE).view(len(GRID), -1).numpy()
    owner, group, barrier, minima = {}, {}, {}, []
    for cell in np.argsort(heights, axis=None):
        i, j = divmod(int(cell), len(GRID))
        near = {
            owner[i + a, j + b] for a in (-1, 0, 1) for b in (-1, 0, 1) if (i + a, j + b) in owner
        }
        roots = sorted({root(group, n) for n in near})
        if not roots:
            minima.append(PLANE[cell])
            roots = [len(minima) - 1]
            group[roots[0]] = roots[0]
        for other in roots[1:]:
            for a in members(group, roots[0]):
                for b in members(group, other):
                    barrier[min(a, b), max(a, b)] = heights[i, j]
            group[other] = roots[0]
        owner[i, j] = roots[0]
    return torch.stack(minima), barrier


def root(group, n):
    while group[n] != n:
        n = group[n]
    return n


def members(group, of):
    return [n for n in group if root(group, n) == of]


CHAINS = Attraction(
    temperature=0.1, alpha=100.0, step_size=0.02, reach=0.05, patience=300, most=2_000
)


@pytest.fixture(scope="module")
def found() -> Landscape:
    starts = 3 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double() - 1.5
    return explore(Mixture(), starts, CHAINS, apart=0.1, descent=300, pulls=150)


def test_every_minimum_is_found_once_and_every_start_falls_to_its_own(found, truth):
    minima, _ = truth
    assert len(minima) == len(found.minima) == 4
    gaps = torch.cdist(found.minima, minima).min(1)
    assert sorted(gaps.indices.tolist()) == [0, 1, 2, 3]
    assert float(gaps.values.max()) < float(GRID[1] - GRID[0])
    starts = 3 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double() - 1.5
    x = starts
    for _ in range(20_000):  # the gradient's flow itself, in steps too small to leave a basin
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(Mixture()(z).sum(), z)
        x = z.detach() - 2e-3 * slope
        if float(slope.norm(dim=1).max()) < 1e-3:
            break
    assert torch.cdist(x, found.minima).argmin(1).tolist() == found.start.tolist()


def test_barriers_are_those_of_a_flooded_grid_within_five_percent(found, truth):
    minima, barrier = truth
    names = torch.cdist(found.minima, minima).argmin(1).tolist()
    tree_height = {}
    members_of = {i: [i] for i in range(4)}
    for merge in found.tree():
        for i in members_of[merge.first]:
            for j in members_of[merge.second]:
                tree_height[frozenset((names[i], names[j]))] = merge.barrier
        members_of[merge.number] = members_of[merge.first] + members_of[merge.second]
    assert len(tree_height) == 6
    floor = float(found.energies.min())
    for (a, b), height in barrier.items():
        mine = tree_height[frozenset((a, b))] - floor
        assert mine == pytest.approx(height - floor, rel=0.05)


def test_paths_pulled_taut_climb_less_than_the_chains_that_found_them(found):
    loose = explore(Mixture(), found.minima, CHAINS, apart=0.1, descent=0, pulls=0)
    assert (found.barriers <= loose.barriers + 1e-6).all()
    assert (found.barriers < loose.barriers - 1e-6).any()


def test_basins_join_where_the_attraction_is_stronger_than_every_slope(found):
    assert found.basins == [[0, 1, 2, 3]]  # α·T = 10 is steeper than any wall here
    weak = explore(
        Mixture(), found.minima, Attraction(
            temperature=0.1, alpha=3.0, step_size=0.02, reach=0.05, patience=100, most=500
        ), apart=0.1, descent=0, pulls=0,
    )  # fmt: skip
    assert weak.basins == [[0], [1], [2], [3]]
    assert not weak.tree()  # no path was found, so that nothing joins


def test_a_chain_climbs_no_less_than_the_barrier_and_paths_pulled_taut_no_more(found, truth):
    start, target = found.minima[:1], found.minima[1:2]
    crossing = attract(
        Mixture(), start, target, CHAINS, chain_keys(0, "climb", range(1), range(1))[0]
    )
    assert bool(crossing.arrived)
    path = torch.cat([start[None], crossing.path, target[None]])
    lower = taut(Mixture(), path, steps=100)
    assert float(lower) <= float(crossing.barrier)
    minima, barrier = truth
    names = torch.cdist(found.minima[:2], minima).argmin(1).tolist()
    assert float(lower) >= barrier[min(names), max(names)] - 0.01


class DoubleWell(nn.Module):
    """(x² − 1)², whose walls are nowhere steeper than 8/(3√3) between its wells."""

    def forward(self, x):
        return (x.flatten(1).square() - 1).square().sum(1)


def test_the_weakest_attraction_that_succeeds_is_the_steepest_wall():
    """Without much noise a chain climbs where α·T is more than the slope."""
    start, target = (torch.tensor([s], dtype=torch.float64) for s in (-1.0, 1.0))
    cold = 2_000.0  # the wall in units of the temperature, so that noise helps little

    class Cold(DoubleWell):
        def forward(self, x):
            return cold * super().forward(x)

    chain = Attraction(alpha=2.0 * cold, step_size=0.005, reach=0.2, patience=200, most=1_000)
    found = weakest_attraction(Cold(), start, target, chain, trials=2) / cold
    assert found == pytest.approx(8 / (3 * math.sqrt(3)), rel=0.05)
    weak = replace(chain, alpha=cold)
    assert weakest_attraction(Cold(), start, target, weak, trials=2) == math.inf


def test_a_tree_joins_the_lowest_barriers_first_and_leaves_the_unreached_apart():
    inf = math.inf
    barriers = torch.tensor([[0.0, 5, 3, inf], [5, 0, 4, inf], [3, 4, 0, inf], [inf, inf, inf, 0]])
    found = Landscape(
        minima=torch.zeros(4, 1),
        energies=torch.zeros(4),
        start=torch.arange(4),
        crossed=torch.eye(4, dtype=torch.bool),
        barriers=barriers,
    )
    heights = [(sorted((m.first, m.second)), m.barrier, m.number) for m in found.tree()]
    assert heights == [([0, 2], 3.0, 4), ([1, 4], 4.0, 5)]


def test_points_are_spread_evenly_along_a_polygon():
    path = torch.tensor([[0.0, 0.0], [0.1, 0.0], [1.0, 0.0], [1.0, 1.0]])[:, None]
    even = spread(path, 5)[:, 0]
    expected = [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [1.0, 0.5], [1.0, 1.0]]
    torch.testing.assert_close(even, torch.tensor(expected))
    still = torch.ones(3, 2, 2)
    torch.testing.assert_close(spread(still, 4), torch.ones(4, 2, 2))


def test_images_are_states_too_and_stay_within_their_bound():
    x = torch.tensor([[2.0, 2.0], [-2.0, 2.0]]).double().view(2, 2, 1, 1)
    ends = minimise(Mixture(), x, steps=200, bound=0.7)
    assert float(ends.abs().max()) <= 0.7
    kept, own = distinct(torch.cat([ends, ends]), 1e-6)
    assert len(kept) == 2
    assert own.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "bad", [{"temperature": 0.0}, {"alpha": -1.0}, {"reach": 0.0}, {"patience": 0}, {"bound": -1.0}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(UsageError, match="must be"):
        Attraction(**bad)
