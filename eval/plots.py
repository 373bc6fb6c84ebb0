"""Figures of several runs: accuracy over steps, over eps, over K; cost and natural accuracy."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ebm_defense.eval.report import Report
from ebm_defense.eval.statistics import Share, share
from ebm_defense.files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
# Colours that the colour-blind tell apart (Okabe, Ito 2008), without the yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
MARKERS = "osD^vPX"
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


class Point(NamedTuple):
    """One run in a figure."""

    name: str
    x: float
    share: Share


Curves = dict[str, list[Point]]


def over_steps(reports: Sequence[Report]) -> Figure | None:
    """Draw accuracy after each step of the last attack, with its interval; a line a run."""
    figure, axis = step_canvas()
    shown = [r for r in reports if r.protocol.attacks[-1].looks > 1]
    for i, report in enumerate(shown):
        draw_curve(axis, report, i)
    _legend(axis)
    return figure if shown else None


def step_canvas() -> tuple[Figure, Axes]:
    """Return empty axes of accuracy over attack steps."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = _canvas("attack step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axis


def draw_curve(axis: Axes, report: Report, number: int, attack: int = -1, label: str = "") -> None:
    """Draw accuracy after each step of one attack as stairs, with its Wilson interval."""
    curve, total = report.curve(attack), len(report.records)
    shares = [share(round(value * total), total) for value in curve]
    steps, colour = np.arange(len(shares)), COLOURS[number % len(COLOURS)]
    axis.step(
        steps,
        [100 * s.value for s in shares],
        where="post",
        color=colour,
        label=label or report.name,
    )
    low, high = (
        [100 * v for v in ends] for ends in zip(*((s.low, s.high) for s in shares), strict=True)
    )
    axis.fill_between(steps, low, high, step="post", color=colour, alpha=0.15, linewidth=0)


def over_eps(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over eps; a line for runs that differ in eps and attack step alone."""
    return _series(reports, _eps, "eps, in [0, 1] pixel units", _without_eps)


def over_chain(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over Langevin steps K; a line for runs that differ in K alone."""
    return _series(reports, _chain, "Langevin steps K", _without_chain)


def against_natural(reports: Sequence[Report]) -> Figure | None:
    """Draw robust against natural accuracy, a point a run."""
    points = [Point(r.name, 100 * r.share("clean").value, r.robust()) for r in reports]
    return _scatter(points, "natural accuracy %")


def against_cost(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy against the chain-steps of one classification, a point a run."""
    points = [Point(r.name, prediction_cost(r), r.robust()) for r in reports]
    return _scatter(points, "chain-steps of one classification")


def prediction_cost(report: Report) -> float:
    """Return the Langevin steps of one classification: K times replicates; 0 without a chain."""
    defense = report.settings["defense"]
    return float(_chain(report) or 0) * float(defense["replicates"])


FIGURES: dict[str, Callable[[Sequence[Report]], Any]] = {
    "accuracy-over-steps": over_steps,
    "accuracy-over-eps": over_eps,
    "accuracy-over-langevin-steps": over_chain,
    "robust-against-natural": against_natural,
    "robust-against-cost": against_cost,
}


def draw_figures(reports: Sequence[Report], folder: Path) -> list[Path]:
    """Write every figure that the runs have data for, as PNG, PDF and SVG, and return the files."""
    import matplotlib as mpl

    written = []
    with mpl.rc_context({"svg.hashsalt": "ebm-defense"}):  # the same picture is the same file
        for name, draw in FIGURES.items():
            figure = draw(reports)
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


def _canvas(xlabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=xlabel, ylabel="robust accuracy %", ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis


def _legend(axis: Axes) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False)


def _bars(axis: Axes, points: Sequence[Point], number: int, line: str, label: str) -> None:
    height = [100 * p.share.value for p in points]
    down = [100 * (p.share.value - p.share.low) for p in points]
    up = [100 * (p.share.high - p.share.value) for p in points]
    axis.errorbar(
        [p.x for p in points],
        height,
        yerr=[np.maximum(down, 0), np.maximum(up, 0)],
        fmt=MARKERS[number % len(MARKERS)] + line,
        color=COLOURS[number % len(COLOURS)],
        capsize=2,
        markersize=4,
        label=label,
    )


def _scatter(points: Sequence[Point], xlabel: str) -> Figure | None:
    figure, axis = _canvas(xlabel)
    for i, point in enumerate(points):
        _bars(axis, [point], i, "", point.name)
    _legend(axis)
    return figure if len(points) > 1 else None


def _series(
    reports: Sequence[Report],
    x: Callable[[Report], float | None],
    xlabel: str,
    rest: Callable[[dict[str, Any]], None],
) -> Figure | None:
    figure, axis = _canvas(xlabel)
    curves = group(reports, x, rest)
    for i, (label, points) in enumerate(curves.items()):
        _bars(axis, points, i, "-", label)
    _legend(axis)
    return figure if curves else None


def group(
    reports: Sequence[Report],
    x: Callable[[Report], float | None],
    rest: Callable[[dict[str, Any]], None],
) -> Curves:
    """Return the points of runs that differ in x alone, by the first one's name; two or more each.

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
            groups.setdefault(key, []).append(Point(report.name, value, report.robust()))
    found = [sorted(points, key=lambda p: p.x) for points in groups.values()]
    return {ps[0].name: ps for ps in found if len({p.x for p in ps}) > 1}


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
