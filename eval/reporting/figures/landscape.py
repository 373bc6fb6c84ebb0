"""The tree of an energy's basins, with an image at each leaf, and when its classes mix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_defense.eval.mixing import Mixing, starts_to_mix
from ebm_defense.eval.reporting.figures.pictures import pixels
from ebm_defense.landscape import Landscape, Merge
from ebm_defense.storage.files import atomic

WIDTH, MARGIN = 0.55, 0.12
"""Inches a leaf, and the share of the tree's height below its lowest leaf."""
INK, MIXED = "#333333", "#d1453b"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")
"""Of metastable basins; those of a single minimum are grey."""
ALONE = "#6e7781"


def draw_landscape(
    found: Landscape,
    images: Tensor,
    names: Sequence[str],
    mixing: Sequence[Mixing],
    classes: Sequence[str],
    path: Path,
    *,
    scale: float = 1.0,
    title: str = "",
) -> None:
    """Draw the disconnectivity tree and the mixing of classes.

    Args:
        found: minima and barriers.
        images: what stands at the leaves, `[n, C, H, W]` in [0, 1], one a minimum.
        names: under them, one a minimum.
        mixing: by numbers of steps.
        classes: names of classes, by number.
        path: where the picture goes; its suffix chooses the format.
        scale: T, which energies are shown in units of.
        title: above it.
    """
    from matplotlib.figure import Figure

    width = max(6.0, WIDTH * len(found.minima))
    figure = Figure(figsize=(width + 5.0, 6.5), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=[width, 5.0])
    _tree(axes[0], found, images, names, scale)
    _mixing(axes[1], mixing, classes)
    if title:
        figure.suptitle(title)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110)


def places(found: Landscape) -> dict[int, float]:
    """Return where each basin stands from left to right, so that no two branches cross."""
    parents = {part: m for m in found.tree() for part in (m.first, m.second)}
    merges = {m.number: m for m in found.tree()}
    roots = [n for n in [*merges, *range(len(found.minima))] if n not in parents]
    order = [leaf for root in sorted(roots) for leaf in _leaves(root, merges)]
    at = {leaf: float(k) for k, leaf in enumerate(order)}
    for merge in found.tree():
        at[merge.number] = (at[merge.first] + at[merge.second]) / 2
    return at


def _leaves(number: int, merges: dict[int, Merge]) -> list[int]:
    if number not in merges:
        return [number]
    merge = merges[number]
    return _leaves(merge.first, merges) + _leaves(merge.second, merges)


def _tree(axis: Any, found: Landscape, images: Tensor, names: Sequence[str], scale: float) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    lowest = float(found.energies.min())
    height = {i: (float(u) - lowest) / scale for i, u in enumerate(found.energies)}
    at, colours = places(found), _colours(found)
    for merge in found.tree():
        height[merge.number] = (merge.barrier - lowest) / scale
        top = height[merge.number]
        for part in (merge.first, merge.second):
            colour = colours.get(part, INK)
            axis.plot([at[part]] * 2, [height[part], top], color=colour, linewidth=1.5)
        axis.plot([at[merge.first], at[merge.second]], [top, top], color=INK, linewidth=1.5)
    span = max(height.values()) or 1.0
    for leaf in range(len(found.minima)):
        picture = OffsetImage(pixels(images[leaf]), zoom=1.1, cmap="gray")
        spot = (at[leaf], height[leaf] - MARGIN * span)
        axis.add_artist(AnnotationBbox(picture, spot, pad=0.15, bboxprops={"ec": colours[leaf]}))
        axis.plot(at[leaf], height[leaf], "o", color=colours[leaf], markersize=4)
        axis.annotate(
            names[leaf], spot, xytext=(0, -22), textcoords="offset points",
            ha="center", va="top", rotation=90, fontsize=7,
        )  # fmt: skip
    axis.set(
        title="minima, and the lowest barriers found between them",
        ylabel="U above the lowest minimum" + (" / T" if scale != 1.0 else ""),
        xticks=[], xlim=(-0.7, len(found.minima) - 0.3), ylim=(-0.45 * span, 1.05 * span),
    )  # fmt: skip


def _colours(found: Landscape) -> dict[int, str]:
    """Return the colour of each minimum, that of its metastable basin."""
    shared = [basin for basin in found.basins if len(basin) > 1]
    named = {i: COLOURS[k % len(COLOURS)] for k, basin in enumerate(shared) for i in basin}
    return dict.fromkeys(range(len(found.minima)), ALONE) | named


def _mixing(axis: Any, mixing: Sequence[Mixing], classes: Sequence[str]) -> None:
    steps = [m.steps for m in mixing]
    axis.plot(steps, [100 * m.moved.value for m in mixing], "o-", color=INK, markersize=3)
    axis.fill_between(
        steps, [100 * m.moved.low for m in mixing], [100 * m.moved.high for m in mixing],
        color=INK, alpha=0.15, linewidth=0,
    )  # fmt: skip
    first = starts_to_mix(mixing)
    if first is not None:
        axis.axvline(first.steps, color=MIXED, linestyle="--", linewidth=1)
        moves = [f"{_name(a, classes)} → {_name(b, classes)}: {n}"
                 for (a, b), n in list(first.moves.items())[:6]]  # fmt: skip
        axis.text(
            0.03, 0.97, "\n".join([f"at K = {first.steps}:", *moves]),
            transform=axis.transAxes, va="top", fontsize=8, color=MIXED,
        )  # fmt: skip
    axis.set(
        title="chains that have left their class", xlabel="Langevin steps K", ylabel="%",
        xscale="symlog", xlim=(0, None), ylim=(0, 100),
    )  # fmt: skip


def _name(number: int, classes: Sequence[str]) -> str:
    return classes[number] if number < len(classes) else str(number)
