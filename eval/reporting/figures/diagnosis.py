"""One page of pictures that says whether an energy's chains converge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ebm_defense.eval.purification_curve import Point
from ebm_defense.eval.reporting.figures.pictures import pixels
from ebm_defense.learning.convergence import Chains, Convergence
from ebm_defense.learning.diagnostics import autocorrelation
from ebm_defense.storage.files import atomic

SHOWN = 12
"""Chains whose images are pictured."""
DATA, NOISE, REFERENCE = "#1f77b4", "#d1453b", "#6e7781"


def draw_diagnosis(
    found: Convergence,
    chains: Chains,
    points: Sequence[Point],
    path: Path,
    history: pd.DataFrame | None = None,
) -> None:
    """Draw energies along chains, the purification curve, learning's curves and the chains' images.

    Args:
        found: the verdict, which stands above.
        chains: the long chains that it rests on.
        points: accuracy and compression by length.
        path: where the picture goes; its suffix chooses the format.
        history: learning's update, d_s and r_s, if they were kept.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 11), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.15])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = above.subplots(1, 3 if history is None else 4)
    _energies(axes[0], chains)
    _accuracies(axes[1], points)
    _compression(axes[2], points)
    if history is not None:
        _learning(axes[3], history)
    _images(below, chains)
    figure.suptitle(f"{found.verdict}: {found.reason}", fontsize=12)
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


def _learning(axis: Any, history: pd.DataFrame) -> None:
    late = history["d_s"].to_numpy()[len(history) // 2 :]
    axis.stem(autocorrelation(late.tolist()), markerfmt=" ", basefmt="k-")
    axis.set(title="autocorrelation of d_s, second half", xlabel="lag")


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
