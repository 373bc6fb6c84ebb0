"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.purifiers.base import Purifier
from ebm_defense.storage.files import atomic

MOMENTS = (0, 10, 50, 100, 200, 500, 1000, 1500, 2000)
RIGHT, WRONG, PLAIN = "#1f883d", "#d1453b", "#6e7781"
"""Ink that can be read on white paper and on a dark page, for the picture has no ground."""

Strip = list[tuple[str, Tensor]]
"""Rows of a film strip: a name and images `[n, C, H, W]` in [0, 1]."""


@torch.no_grad()
def film_strip(purifier: Purifier, images: Tensor, seed: int = 0) -> Strip:
    """Purify images and return them after K = 0, 10, 50, … steps, one replicate each."""
    last = purifier.chain_steps
    moments = sorted({k for k in MOMENTS if k < last} | {last})
    keys = chain_keys(seed, "film strip", range(len(images)), range(1))[0].to(images.device)
    seen = purifier.on_the_way(images, KeyedNoise(keys), moments)
    return [(f"K = {k}" if len(seen) > 1 else "purified", x) for k, x in sorted(seen.items())]


def purification_rows(
    defense: PurifiedClassifier, originals: Tensor, adversarial: Tensor, seed: int = 0
) -> Strip:
    """Return the rows of `purification.png`: original, adversarial, and on its way to purified."""
    rows: Strip = [("original", originals), ("adversarial", adversarial)]
    return rows + film_strip(defense.purifier, adversarial, seed)


def draw_strip(
    rows: Strip,
    path: Path,
    classify: Callable[[Tensor], Tensor] | None = None,
    labels: Tensor | None = None,
    classes: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw a film strip, with the classifier's verdict under each image if one is given.

    Args:
        rows: names and images.
        path: where the picture goes; its suffix chooses the format.
        classify: maps images to logits.
        labels: true classes `[n]`, which colour the verdicts green or red.
        classes: names of the classes.
        title: above the picture.
    """
    from matplotlib.figure import Figure

    columns = len(rows[0][1])
    figure = Figure(figsize=(1.15 * columns + 1.2, 1.38 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows, axes, strict=True):
        verdicts = None if classify is None else _verdicts(classify, images)
        for i, axis in enumerate(line):
            axis.imshow(pixels(images[i]), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(PLAIN)
            if verdicts is not None:
                right = None if labels is None else bool(verdicts[i] == labels[i])
                named = verdicts[i] < len(classes)
                text = classes[verdicts[i]] if named else str(verdicts[i])
                axis.set_xlabel(text, fontsize=8, color=_colour(right), labelpad=2)
        side = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
        line[0].set_ylabel(name, fontsize=9, color=PLAIN, **side)
    figure.suptitle(title, fontsize=10, color=PLAIN)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=130, transparent=True)


def _verdicts(classify: Callable[[Tensor], Tensor], images: Tensor) -> list[int]:
    with torch.no_grad():
        return [int(v) for v in classify(images).argmax(-1)]


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    """Return an image `[C, H, W]` as pixels `[H, W]` or `[H, W, 3]`, clipped to [0, 1]."""
    shown = image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return shown[..., 0] if shown.shape[-1] == 1 else shown[..., :3]


def _colour(right: bool | None) -> str:
    if right is None:
        return PLAIN
    return RIGHT if right else WRONG
