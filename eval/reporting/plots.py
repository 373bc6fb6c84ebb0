"""Figures of several runs: accuracy over steps, over eps, over K; cost and natural accuracy."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebm_defense.eval.judging.statistics import Share, share
from ebm_defense.eval.reporting.report import Report
from ebm_defense.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROBUST = "robust accuracy %"
FORMATS = ("png", "pdf", "svg")
# Colours that the colour-blind tell apart (Okabe, Ito 2008), without the yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
MARKERS = "osD^vPX"
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


LINES = ("-", "--", "-.", ":")
BARS = 8
"""Intervals that a curve over steps shows; more would be a grey wall."""
APART, MARGIN = 7.0, 0.06
"""Points of print between marks that would lie on one another; space beside the outer ones."""


class Point(NamedTuple):
    """One run in a figure."""

    name: str
    x: float
    share: Share
    natural: Share


class Curve(NamedTuple):
    """Runs that differ in one number alone."""

    label: str
    points: list[Point]


def over_steps(reports: Sequence[Report]) -> Figure | None:
    """Draw accuracy after each step of the last attack, with its interval; a line a run."""
    shown = [r for r in reports if r.protocol.attacks[-1].looks > 1]
    figure, axis = step_canvas(_ylabel(shown))
    for i, report in enumerate(shown):
        draw_curve(axis, report, i, of=len(shown))
    draw_legend(axis)
    return figure if shown else None


def step_canvas(ylabel: str = ROBUST) -> tuple[Figure, Axes]:
    """Return empty axes of accuracy over attack steps."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = _canvas("attack step", ylabel)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axis


def draw_curve(
    axis: Axes, report: Report, number: int, attack: int = -1, label: str = "", of: int = 1
) -> None:
    """Draw accuracy after each step of one attack as stairs, with Wilson intervals.

    Args:
        axis: from `step_canvas`.
        report: the run.
        number: which of the figure's curves this is.
        attack: the attack's number.
        label: stands in the legend; the run's name if not given.
        of: how many curves there are, so that no interval hides another.
    """
    found, total = report.curve(attack), len(report.records)
    curve, steps = found.to_numpy(), found.index.to_numpy(dtype=float)
    look, name = _look(number), label or report.name
    # A stair lies about its step, so that the last one, the verdict, has a width too.
    edges = np.append(steps, steps[-1] + 1.0) - 0.5
    axis.stairs(100 * curve, edges, baseline=None, label=name, **look)
    every = math.ceil(len(curve) / BARS)
    shown = np.arange(len(curve) - number * every // of)[::-every]
    shares = [share(round(curve[s] * total), total) for s in shown]
    across = (number + 1) / (of + 1) - 0.5
    axis.errorbar(
        steps[shown] + across,
        [100 * s.value for s in shares],
        yerr=_ends(shares),
        fmt="none",
        ecolor=look["color"],
        capsize=2,
        elinewidth=1,
    )


def _look(number: int) -> dict[str, Any]:
    """Return the look of a line, which is thinner than those that it may lie on."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "linewidth": max(2.6 - 0.4 * number, 1.0),
    }


def _ends(shares: Sequence[Share]) -> NDArray[Any]:
    """Return how far intervals reach down and up, in percent, `[2, n]`."""
    down = [max(s.value - s.low, 0.0) for s in shares]
    up = [max(s.high - s.value, 0.0) for s in shares]
    return 100 * np.array([down, up])


def over_eps(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over eps; a line for runs that differ in eps and attack step alone."""
    return _series(reports, _eps, "eps, in [0, 1] pixel units", _without_eps)


def over_chain(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over Langevin steps K; a line for runs that differ in K alone."""
    return _series(reports, _chain, "Langevin steps K", _without_chain)


def against_natural(reports: Sequence[Report]) -> Figure | None:
    """Draw robust against natural accuracy, a point a run."""
    points = [_point(r, 100 * r.share("clean").value) for r in reports]
    return _scatter(points, "natural accuracy %", _ylabel(reports), both=True)


def against_cost(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy against the chain-steps of one prediction, a point a run."""
    points = [_point(r, r.prediction_cost()) for r in reports]
    return _scatter(points, "Langevin steps a prediction", _ylabel(reports))


class Drawing(NamedTuple):
    """A figure of runs; drawing it gives None where they have no data for it."""

    draw: Callable[[Sequence[Report]], Any]
    caption: str


FIGURES: dict[str, Drawing] = {
    "accuracy-over-steps": Drawing(over_steps, "Accuracy after each step of the last attack."),
    "accuracy-over-eps": Drawing(over_eps, "Robust accuracy over the size of the perturbation."),
    "accuracy-over-langevin-steps": Drawing(
        over_chain, "Robust accuracy over the length of the chain."
    ),
    "robust-against-natural": Drawing(against_natural, "Robust against natural accuracy."),
    "robust-against-cost": Drawing(
        against_cost, "Robust accuracy against the cost of a prediction."
    ),
}


def draw_figures(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write every figure that the runs have data for, as PNG, PDF and SVG, and return the files."""
    import matplotlib as mpl

    written = []
    with mpl.rc_context({"svg.hashsalt": "ebm-defense"}):  # the same picture is the same file
        for name, drawing in FIGURES.items():
            figure = drawing.draw(reports)
            for suffix in FORMATS if figure is not None else ():
                assert figure is not None
                with atomic(folder / f"{name}.{suffix}") as partial:
                    figure.savefig(partial, dpi=150, metadata=UNDATED[suffix])
                written.append(folder / f"{name}.{suffix}")
    return written


def inline_svg(figure: Figure) -> str:
    """Return a figure as SVG for a page, its ink in the colour of the page's text."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ebm-defense", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=UNDATED["svg"])
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")


def _canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis


def _ylabel(reports: Sequence[Report]) -> str:
    """Return what the vertical axis shows: under which attack, where it is the same for all."""
    attacks = {r.final_title() for r in reports}
    return f"{ROBUST},\n{attacks.pop()}" if len(attacks) == 1 else ROBUST


def draw_legend(axis: Axes) -> None:
    """Put the legend above the axes, where it hides no data."""
    from matplotlib.container import ErrorbarContainer

    handles, labels = axis.get_legend_handles_labels()
    # Of a mark with its intervals the mark alone: it is small enough.
    handles = [h[0] if isinstance(h, ErrorbarContainer) else h for h in handles]
    if labels:
        assert axis.figure is not None
        axis.figure.legend(
            handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False
        )


def _point(report: Report, x: float) -> Point:
    return Point(report.name, x, report.robust(), report.share("clean"))


def _bars(
    axis: Axes,
    points: Sequence[Point],
    number: int,
    line: str,
    label: str,
    *,
    shift: float = 0.0,
    both: bool = False,
) -> None:
    from matplotlib.transforms import ScaledTranslation

    assert axis.figure is not None
    aside = ScaledTranslation(shift / 72, 0, axis.figure.dpi_scale_trans)
    axis.errorbar(
        [p.x for p in points],
        [100 * p.share.value for p in points],
        yerr=_ends([p.share for p in points]),
        xerr=_ends([p.natural for p in points]) if both else None,
        fmt=MARKERS[number % len(MARKERS)] + line,
        color=COLOURS[number % len(COLOURS)],
        capsize=2,
        elinewidth=1,
        markersize=5,
        markerfacecolor="none",  # so that a mark shows what lies under it
        label=label,
        transform=axis.transData + aside if shift else axis.transData,
        clip_on=False,
    )


def _scatter(
    points: Sequence[Point], xlabel: str, ylabel: str, both: bool = False
) -> Figure | None:
    figure, axis = _canvas(xlabel, ylabel)
    ends = [100 * end for p in points for end in p.natural[2:]] if both else [p.x for p in points]
    room = MARGIN * (max(ends) - min(ends) or 1.0)
    axis.set_xlim(min(ends) - room, max(ends) + room)
    for i, point in enumerate(points):
        alike = [p.name for p in points if p.x == point.x]
        # Accuracies are read off, and stay where they are; equal costs stand side by side.
        shift = 0.0 if both else APART * (alike.index(point.name) - (len(alike) - 1) / 2)
        _bars(axis, [point], i, "", point.name, shift=shift, both=both)
    draw_legend(axis)
    return figure if len(points) > 1 else None


def _series(
    reports: Sequence[Report],
    x: Callable[[Report], float | None],
    xlabel: str,
    rest: Callable[[dict[str, Any]], None],
) -> Figure | None:
    figure, axis = _canvas(xlabel, ROBUST)
    curves = group(reports, x, rest)
    for i, curve in enumerate(curves):
        _bars(axis, curve.points, i, "-", curve.label)
    draw_legend(axis)
    return figure if curves else None


def group(
    reports: Sequence[Report],
    x: Callable[[Report], float | None],
    rest: Callable[[dict[str, Any]], None],
) -> list[Curve]:
    """Return the points of runs that differ in x alone, two or more each, under what they share.

    Args:
        reports: the runs.
        x: the number that may differ; None where a run has none.
        rest: takes that number, and what follows from it, out of a copy of the settings.
    """
    groups: dict[str, list[Point]] = {}
    for report in reports:
        value, settings = x(report), copy.deepcopy(report.settings)
        rest(settings)
        if value is not None:
            key = json.dumps(settings, sort_keys=True)
            groups.setdefault(key, []).append(_point(report, value))
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
