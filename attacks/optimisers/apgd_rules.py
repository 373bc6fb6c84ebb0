"""How Auto-PGD moves, and when it takes stock: one rule a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.norms import per_image
from ebm_defense.attacks.session import QueryResult
from ebm_defense.attacks.threat import ThreatModel

RISE = 0.75  # ρ: the share of rising steps below which a step is halved
INERTIA = 0.75  # a: the share of the new move in a step
FIRST_PART = 5  # the first sparse steps move one pixel in so many
SPARSER = 1.5  # a sparse step moves so many times fewer pixels than the best point has changed
FEWER = 0.95  # the best point has become sparser if it changed less than this share of before
SHRINK, SMALLEST = 1.5, 0.1  # of a sparse step's size, the latter in eps


class Climb(NamedTuple):
    """Where each image's ascent is, every tensor `[b, …]`.

    Attributes:
        x: the iterate, and `before` the one before it.
        gradient: at x.
        loss: at x.
        best: the point of the highest loss, with its `best_gradient` and `best_loss`.
        size: the step size.
        returned: whether the last check sent it back to its best point.
        rises: steps since the last check that raised the loss.
        checked: the best loss at the last check.
        pixels: how many a sparse step moves.
        support: how many the best point had changed at the last check.
    """

    x: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    size: Tensor
    returned: Tensor
    rises: Tensor
    checked: Tensor
    pixels: Tensor
    support: Tensor

    def of(self, stands: Tensor) -> Climb:
        """Return the ascent of these images alone."""
        return Climb(*(values[stands] for values in self))


class Rule(NamedTuple):
    """The ascent's rule in one norm.

    Attributes:
        first: the first step's size, in eps.
        advance: the ascent, the originals, the threat model and the step's number, from 1, to the
            ascent one step further.
        checks: the steps of a run to the steps after which to take stock, and of how many each.
        check: the ascent, the originals, eps and how many steps, to the ascent after taking stock.
    """

    first: float
    advance: Callable[[Climb, Tensor, ThreatModel, int], Climb]
    checks: Callable[[int], dict[int, int]]
    check: Callable[[Climb, Tensor, float, int], Climb]


def begin(x: Tensor, seen: QueryResult, size: float) -> Climb:
    """Return the ascent at its start, just seen, with the first step's size."""
    total = x.shape[1:].numel()
    each = torch.ones_like(seen.loss)
    return Climb(
        x=x,
        before=x,
        gradient=seen.gradient,
        loss=seen.loss,
        best=x,
        best_gradient=seen.gradient,
        best_loss=seen.loss,
        size=size * each,
        returned=each.bool(),
        rises=0.0 * each,
        checked=seen.loss,
        pixels=math.ceil(total / FIRST_PART) * each,
        support=total * each,
    )


def take_note(climb: Climb, seen: QueryResult) -> Climb:
    """Take note of what was seen at the iterate."""
    better = seen.loss > climb.best_loss
    wide = per_image(better)
    return climb._replace(
        gradient=seen.gradient,
        loss=seen.loss,
        rises=climb.rises + (seen.loss > climb.loss),
        best=torch.where(wide, climb.x, climb.best),
        best_gradient=torch.where(wide, seen.gradient, climb.best_gradient),
        best_loss=torch.where(better, seen.loss, climb.best_loss),
    )


def refresh(climb: Climb, seen: QueryResult) -> Climb:
    """Replace what is known of the best point, chosen for its luck too, by a fresh query."""
    back = per_image(climb.returned)
    return climb._replace(
        gradient=torch.where(back, seen.gradient, climb.gradient),
        best_gradient=seen.gradient,
        best_loss=seen.loss,
        checked=seen.loss,
    )


def reviews(checks: Iterable[int], every: int) -> list[int]:
    """Return the checks at which the best point is seen afresh: `every` steps apart, or more."""
    last, chosen = 0, []
    for at in checks:
        if at - last >= every:
            chosen.append(at)
            last = at
    return chosen


def _go_back(climb: Climb, returned: Tensor) -> Climb:
    wide = per_image(returned)
    return climb._replace(
        x=torch.where(wide, climb.best, climb.x),
        gradient=torch.where(wide, climb.best_gradient, climb.gradient),
        returned=returned,
    )


def glide(climb: Climb, origin: Tensor, threat: ThreatModel, step: int) -> Climb:
    """Take one step with momentum (Croce and Hein 2020, algorithm 1, lines 7 and 8)."""
    inertia = INERTIA if step > 1 else 1.0
    z = threat.step(climb.x, origin, climb.gradient, per_image(climb.size))
    z, x, before = (at.to(climb.gradient) for at in (z, climb.x, climb.before))
    moved = inertia * (z - x) + (1.0 - inertia) * (x - before)
    return climb._replace(x=threat.project(x + moved, origin), before=climb.x)


def windows(steps: int) -> dict[int, int]:
    """Return the checks of a run with momentum: after which step, of how many steps each.

    The first after ⌊0.22·steps⌋, then each window shorter by ⌊0.03·steps⌋ down to ⌊0.06·steps⌋,
    and none of them below 1. A check after the last step would change nothing.
    """
    width, at = max(int(0.22 * steps), 1), 0
    shortest, shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    checks: dict[int, int] = {}
    while at + width < steps:
        at += width
        checks[at] = width
        width = max(width - shrink, shortest)
    return checks


def halve(climb: Climb, origin: Tensor, eps: float, window: int) -> Climb:
    """Halve the step of images that no longer rise, and send them back to their best point."""
    few = climb.rises <= RISE * window
    stuck = ~climb.returned & (climb.best_loss <= climb.checked)
    halved = few | stuck
    return _go_back(climb, halved)._replace(
        size=torch.where(halved, climb.size / 2.0, climb.size),
        rises=torch.zeros_like(climb.rises),
        checked=climb.best_loss,
    )


def leap(climb: Climb, origin: Tensor, threat: ThreatModel, step: int) -> Climb:
    """Take one sparse step, without momentum (Croce and Hein 2021, algorithm 1)."""
    move = sparse_step(climb.gradient, climb.size, climb.pixels)
    return climb._replace(x=threat.project(climb.x + move, origin), before=climb.x)


def sparse_step(gradient: Tensor, size: Tensor, pixels: Tensor) -> Tensor:
    """Return a step of L1 norm `size` `[b]` that moves so many `pixels` `[b]` all alike far.

    They are those of the largest slopes; one without any slope stays.
    """
    slopes = gradient.abs().flatten(1)
    last = pixels.long()[:, None] - 1
    least = slopes.sort(dim=1, descending=True).values.gather(1, last)
    signs = gradient.sign() * (slopes >= least).view_as(gradient)
    count = signs.abs().flatten(1).sum(1).clamp_min(1.0)
    return per_image(size / count) * signs


def ticks(steps: int) -> dict[int, int]:
    """Return the checks of a sparse run: every ⌊0.04·steps⌋ steps, or every one."""
    width = max(int(0.04 * steps), 1)
    return dict.fromkeys(range(width, steps, width), width)


def thin(climb: Climb, origin: Tensor, eps: float, window: int) -> Climb:
    """Follow the best point in how many pixels to move (Croce and Hein 2021, algorithm 1).

    Images whose best point has become sparser go back to it and to steps of eps; the others'
    steps shrink.
    """
    support = (climb.best != origin).flatten(1).sum(1).to(climb.support)
    sparser = support < FEWER * climb.support
    shrunk = (climb.size / SHRINK).clamp_min(SMALLEST * eps)
    return _go_back(climb, sparser)._replace(
        size=torch.where(sparser, torch.full_like(shrunk, eps), shrunk),
        pixels=(support / SPARSER).ceil().clamp_min(1.0),
        support=support,
    )


MOMENTUM = Rule(first=2.0, advance=glide, checks=windows, check=halve)
SPARSE = Rule(first=1.0, advance=leap, checks=ticks, check=thin)

RULES: dict[str, Rule] = {"Linf": MOMENTUM, "L2": MOMENTUM, "L1": SPARSE}
"""Auto-PGD's rule in each norm: Croce and Hein (2020) in Linf and L2, (2021) in L1. A norm that is
not here climbs with momentum."""
