"""Figures of several runs: accuracy over steps, over eps, over K; cost and natural accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebm_defense.eval.reporting.figures.drawing import (
    ROBUST,
    UNDATED,
    Point,
    canvas,
    draw_curve,
    draw_legend,
    draw_marks,
    step_canvas,
)
from ebm_defense.eval.reporting.figures.series import CHAIN, EPS, Axis, group, place
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.storage.columns import CLEAN
from ebm_defense.storage.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
APART, MARGIN = 7.0, 0.06
"""Points of print between marks that would lie on one another; space beside the outer ones."""


def over_steps(reports: Sequence[Report]) -> Figure | None:
    """Draw accuracy after each step of the last attack, with its interval; a line a run."""
    shown = [r for r in reports if r.protocol.attacks[-1].looks > 1]
    figure, axis = step_canvas(_ylabel(shown))
    for i, report in enumerate(shown):
        draw_curve(axis, report, i, of=len(shown))
    draw_legend(axis)
    return figure if shown else None


def over_eps(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over eps; a line for runs that differ in eps and attack step alone."""
    return _series(reports, EPS, "eps, in [0, 1] pixel units")


def over_chain(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy over Langevin steps K; a line for runs that differ in K alone."""
    return _series(reports, CHAIN, "Langevin steps K")


def against_natural(reports: Sequence[Report]) -> Figure | None:
    """Draw robust against natural accuracy, a point a run."""
    points = [place(r, 100 * r.share(CLEAN).value) for r in reports]
    return _scatter(points, "natural accuracy %", _ylabel(reports), both=True)


def against_cost(reports: Sequence[Report]) -> Figure | None:
    """Draw robust accuracy against the chain-steps of one prediction, a point a run."""
    points = [place(r, r.prediction_cost()) for r in reports]
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


def _ylabel(reports: Sequence[Report]) -> str:
    """Return what the vertical axis shows: under which attack, where it is the same for all."""
    attacks = {r.final_title() for r in reports}
    return f"{ROBUST},\n{attacks.pop()}" if len(attacks) == 1 else ROBUST


def _scatter(
    points: Sequence[Point], xlabel: str, ylabel: str, both: bool = False
) -> Figure | None:
    figure, axis = canvas(xlabel, ylabel)
    ends = [100 * end for p in points for end in p.natural[2:]] if both else [p.x for p in points]
    room = MARGIN * (max(ends) - min(ends) or 1.0)
    axis.set_xlim(min(ends) - room, max(ends) + room)
    for i, point in enumerate(points):
        alike = [p.name for p in points if p.x == point.x]
        # Accuracies are read off, and stay where they are; equal costs stand side by side.
        shift = 0.0 if both else APART * (alike.index(point.name) - (len(alike) - 1) / 2)
        draw_marks(axis, [point], i, "", point.name, shift=shift, both=both)
    draw_legend(axis)
    return figure if len(points) > 1 else None


def _series(reports: Sequence[Report], x: Axis, xlabel: str) -> Figure | None:
    figure, axis = canvas(xlabel, ROBUST)
    curves = group(reports, x)
    for i, curve in enumerate(curves):
        draw_marks(axis, curve.points, i, "-", curve.label)
    draw_legend(axis)
    return figure if curves else None
