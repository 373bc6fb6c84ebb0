"""Runs that differ in one number alone: eps, or the length of the chain."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ebm_defense.eval.reporting.figures.drawing import Point
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.storage.columns import CLEAN


class Curve(NamedTuple):
    """Runs that differ in one number alone."""

    label: str
    points: list[Point]


class Axis(NamedTuple):
    """A number in which runs may differ.

    Attributes:
        of: a run's; None where it has none.
        rest: takes it, and what follows from it, out of a copy of the run's settings.
    """

    of: Callable[[Report], float | None]
    rest: Callable[[dict[str, Any]], None]


def place(report: Report, x: float) -> Point:
    """Return a run's place in a figure."""
    return Point(report.name, x, report.robust(), report.share(CLEAN))


def group(reports: Sequence[Report], axis: Axis) -> list[Curve]:
    """Return the points of runs that differ in x alone, two or more each, under what they share.

    Args:
        reports: the runs.
        axis: x.
    """
    groups: dict[str, list[Point]] = {}
    for report in reports:
        value, settings = axis.of(report), copy.deepcopy(report.settings)
        axis.rest(settings)
        if value is not None:
            key = json.dumps(settings, sort_keys=True)
            groups.setdefault(key, []).append(place(report, value))
    found = [sorted(points, key=lambda p: p.x) for points in groups.values()]
    return [Curve(_shared(ps), ps) for ps in found if len({p.x for p in ps}) > 1]


def _shared(points: Sequence[Point]) -> str:
    """Return what the names of a line's points have in common, as "K=50" of "eps=0.1, K=50"."""
    first, *others = (point.name.split(", ") for point in points)
    shared = [part for part in first if all(part in other for other in others)]
    return ", ".join(shared) or f"{points[0].name} to {points[-1].name}"


def _eps(report: Report) -> float | None:
    return report.protocol.attacks[-1].threat.eps


def _without_eps(settings: dict[str, Any]) -> None:
    _drop(settings["protocol"], ("eps", "step_size"))


def _chain(report: Report) -> float | None:
    steps = report.settings["defense"]["purifier"].get("steps")
    return None if steps is None else float(steps)


def _without_chain(settings: dict[str, Any]) -> None:
    settings["defense"]["purifier"].pop("steps", None)
    settings.pop("budget", None)


def _drop(value: Any, names: tuple[str, ...]) -> None:
    """Take some names out of nested settings."""
    if isinstance(value, dict):
        for name in names:
            value.pop(name, None)
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _drop(inner, names)


EPS, CHAIN = Axis(_eps, _without_eps), Axis(_chain, _without_chain)
"""eps in [0, 1] pixel units, and Langevin steps K."""
