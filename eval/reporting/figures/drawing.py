"""What every figure of runs is made of: axes, stairs over steps, marks with intervals, a legend."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ebm_defense.eval.judging.statistics import Share, share
from ebm_defense.eval.reporting.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROBUST = "robust accuracy %"
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


class Point(NamedTuple):
    """One run in a figure."""

    name: str
    x: float
    share: Share
    natural: Share


def step_canvas(ylabel: str = ROBUST) -> tuple[Figure, Axes]:
    """Return empty axes of accuracy over attack steps."""
    from matplotlib.ticker import MaxNLocator

    figure, axis = canvas("attack step", ylabel)
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
    style, name = _style(number), label or report.name
    # A stair lies about its step, so that the last one, the verdict, has a width too.
    edges = np.append(steps, steps[-1] + 1.0) - 0.5
    axis.stairs(100 * curve, edges, baseline=None, label=name, **style)
    every = math.ceil(len(curve) / BARS)
    shown = np.arange(len(curve) - number * every // of)[::-every]
    shares = [share(round(curve[s] * total), total) for s in shown]
    across = (number + 1) / (of + 1) - 0.5
    axis.errorbar(
        steps[shown] + across,
        [100 * s.value for s in shares],
        yerr=_ends(shares),
        fmt="none",
        ecolor=style["color"],
        capsize=2,
        elinewidth=1,
    )


def _style(number: int) -> dict[str, Any]:
    """Return the style of a line, which is thinner than those that it may lie on."""
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


def canvas(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return empty axes of an accuracy in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 100))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    return figure, axis


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


def draw_marks(
    axis: Axes,
    points: Sequence[Point],
    number: int,
    line: str,
    label: str,
    *,
    shift: float = 0.0,
    both: bool = False,
) -> None:
    """Draw points with their intervals, and a line between them.

    Args:
        axis: where.
        points: the runs.
        number: which of the figure's lines this is.
        line: matplotlib's style of it; "" for none.
        label: stands in the legend.
        shift: points of print to the right.
        both: whether the other accuracy has its intervals too.
    """
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


def inline_svg(figure: Figure) -> str:
    """Return a figure as SVG for a page, its ink in the colour of the page's text."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "ebm-defense", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata=UNDATED["svg"])
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace("#000000", "currentColor")
