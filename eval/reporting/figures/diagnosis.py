"""One page of pictures that says whether an energy's chains converge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from ebm_defense.eval.purification_curve import Point
from ebm_defense.eval.reporting.figures.pictures import pixels
from ebm_defense.learning.diagnosis.convergence import Chains, Convergence
from ebm_defense.learning.diagnosis.diagnostics import autocorrelation, cross_correlation
from ebm_defense.storage.files import atomic

SHOWN = 12
"""Chains whose images are pictured."""
DATA, NOISE, REFERENCE = "#1f77b4", "#d1453b", "#6e7781"


class Diagnosis(NamedTuple):
    """What a page shows.

    Attributes:
        found: the verdict, which stands above.
        chains: the long chains that it rests on.
        kept: the share of chains from data that keep their class, at the chains' kept steps.
        points: accuracy and compression by length.
        history: learning's update, d_s and r_s, if they were kept.
    """

    found: Convergence
    chains: Chains
    kept: Sequence[float]
    points: Sequence[Point]
    history: pd.DataFrame | None = None


def draw_diagnosis(shown: Diagnosis, path: Path) -> None:
    """Draw energies along chains, classes kept, the purification curve, learning, and images.

    Args:
        shown: all of it.
        path: where the picture goes; its suffix chooses the format.
    """
    from matplotlib.figure import Figure

    rows = 2 if shown.history is None else 3
    figure = Figure(figsize=(14, 5 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 1, height_ratios=[1, 0.9, 1.2][-rows:])
    parts = [figure.add_subfigure(grid[i]) for i in range(rows)]
    axes = parts[0].subplots(1, 4)
    _energies(axes[0], shown.chains)
    _classes(axes[1], shown)
    _accuracies(axes[2], shown.points)
    _compression(axes[3], shown.points)
    if shown.history is not None:
        _learning(parts[1].subplots(1, 4), shown.history)
    _images(parts[-1], shown.chains)
    figure.suptitle(f"{shown.found.verdict}: {shown.found.reason}", fontsize=12)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110)


def _energies(axis: Any, chains: Chains) -> None:
    centre, spread = float(chains.reference.mean()), float(chains.reference.std())
    axis.axhspan(centre - spread, centre + spread, color=REFERENCE, alpha=0.25, label="data ± sd")
    kept = np.unique(np.geomspace(1, chains.data_energy.shape[1], 200).astype(int)) - 1
    for name, colour, energy in (
        ("from data", DATA, chains.data_energy),
        ("from noise", NOISE, chains.noise_energy),
    ):
        values = energy[:, kept].double()
        axis.plot(kept + 1, values.mean(0), color=colour, label=name)
        low, high = (np.asarray(values.quantile(q, dim=0)) for q in (0.1, 0.9))
        axis.fill_between(kept + 1, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set(xscale="log", xlabel="Langevin step", title="energy along chains (10% to 90%)")
    # What counts is whether chains meet the data, not how high uniform noise begins.
    late = chains.noise_energy[:, len(kept) // 4 :].double()
    ends = [centre - 6 * spread, centre + 6 * spread, float(late[:, -1].min()), float(late.max())]
    axis.set_ylim(min(ends), min(max(ends), centre + 40 * spread))
    axis.legend(fontsize=8)


def _accuracies(axis: Any, points: Sequence[Point]) -> None:
    steps = [p.steps for p in points]
    axis.plot(steps, [100 * p.clean for p in points], "o-", color=DATA, label="clean")
    axis.plot(steps, [100 * p.attacked for p in points], "s-", color=NOISE, label="attacked")
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="Langevin steps K", title="accuracy after K steps, %", ylim=(0, 100), xlim=0)
    axis.legend(fontsize=8)


def _compression(axis: Any, points: Sequence[Point]) -> None:
    steps = [p.steps for p in points]
    axis.plot(steps, [p.compression for p in points], "s-", color=NOISE, label="attacked")
    axis.plot(steps, [p.at_random for p in points], "o--", color=DATA, label="at random")
    axis.axhline(1.0, color="black", linewidth=0.6)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="Langevin steps K", title="‖P(x+δ) − P(x)‖ / ‖δ‖", yscale="log", xlim=0)
    axis.legend(fontsize=8)


def _classes(axis: Any, shown: Diagnosis) -> None:
    axis.plot(shown.chains.steps, [100 * share for share in shown.kept], "o-", color=DATA)
    axis.set_xscale("symlog", linthresh=1)
    axis.set(xlabel="Langevin step", title="chains from data in their class, %", ylim=(0, 100))
    axis.set_xlim(left=0)


def _learning(axes: Any, history: pd.DataFrame) -> None:
    """Draw d_s, r_s, their autocorrelations and how they go together (Nijkamp et al. 2019)."""
    late = {name: history[name].to_numpy()[len(history) // 2 :] for name in ("d_s", "r_s")}
    for axis, name, title in zip(
        axes, late, ("d_s: energy difference / T", "r_s: drift a step"), strict=False
    ):
        axis.plot(history["update"], history[name], linewidth=0.4, color=REFERENCE)
        axis.set(title=title, xlabel="update")
    for name, colour, apart in (("d_s", DATA, -0.15), ("r_s", NOISE, 0.15)):
        found = autocorrelation(late[name].tolist())
        axes[2].vlines(np.arange(len(found)) + apart, 0, found, color=colour, label=name)
    axes[2].axhline(0, color="black", linewidth=0.6)
    axes[2].set(title="autocorrelation, second half", xlabel="lag")
    axes[2].legend(fontsize=8)
    crossed = cross_correlation(late["d_s"].tolist(), late["r_s"].tolist())
    axes[3].vlines(np.arange(len(crossed)) - len(crossed) // 2, 0, crossed, color=REFERENCE)
    axes[3].axhline(0, color="black", linewidth=0.6)
    axes[3].set(title="correlation of d_s(t) with r_s(t + lag)", xlabel="lag")


def _images(figure: Any, chains: Chains) -> None:
    rows = [*zip([f"data, {k}" for k in chains.steps], chains.data, strict=True)]
    rows.append((f"noise, {chains.steps[-1]}", chains.noise[-1]))
    axes = figure.subplots(len(rows), 1)
    for (name, images), axis in zip(rows, axes, strict=True):
        axis.imshow(_line(images[:SHOWN]), cmap="gray", vmin=0, vmax=1, aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)


def _line(images: Tensor) -> np.ndarray[Any, Any]:
    return np.concatenate([pixels((x + 1.0) / 2.0) for x in images], axis=1)
