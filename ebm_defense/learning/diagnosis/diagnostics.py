"""Pictures and curves that tell a convergent energy from one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_defense.engine import Energy
from ebm_defense.errors import UsageError
from ebm_defense.interface.modes import in_eval_mode, modules_of
from ebm_defense.langevin import LangevinSettings, Trace, run_chain
from ebm_defense.learning.energies.trainer import Update
from ebm_defense.noise import KeyedNoise, chain_keys
from ebm_defense.storage.files import atomic

LAGS = 50
OSCILLATING = -0.2
"""Autocorrelation of d_s after one update below which learning counts as oscillating."""


def autocorrelation(values: Sequence[float], lags: int = LAGS) -> list[float]:
    """Return the autocorrelation of a series at lags 0 to `lags` (fewer if it is short)."""
    x = np.asarray(values, dtype=np.float64)
    x = x - x.mean() if len(x) else x
    scale = float((x * x).sum())
    if scale == 0.0:  # a constant or empty series knows only itself
        return [1.0]
    return [
        float((x[: len(x) - k] * x[k:]).sum()) / scale for k in range(min(lags, len(x) - 1) + 1)
    ]


def cross_correlation(
    first: Sequence[float], second: Sequence[float], lags: int = LAGS
) -> list[float]:
    """Return the correlation of first(t) with second(t + lag), lags from −`lags` to `lags`.

    0 throughout where either is constant.

    Raises:
        UsageError: series of different lengths.
    """
    if len(first) != len(second):
        raise UsageError(f"two series of {len(first)} and {len(second)} numbers do not correlate.")
    x, y = (np.asarray(v, dtype=np.float64) for v in (first, second))
    most = min(lags, max(len(x) - 1, 0))
    x, y = (v - v.mean() if len(v) else v for v in (x, y))
    scale = float(np.sqrt((x * x).sum() * (y * y).sum())) or np.inf
    whole = np.correlate(y, x, mode="full") / scale if len(x) else np.zeros(1)
    middle = len(whole) // 2
    return [float(v) for v in whole[middle - most : middle + most + 1]]


class Signs(NamedTuple):
    """What the curves of a learning's second half say (Nijkamp et al. 2019).

    Attributes:
        mean: of d_s; near 0 where data and chains agree.
        swing: its standard deviation.
        after_one: its autocorrelation from one update to the next; well below 0 where learning
            oscillates, which goes with chains that do not converge.
        strength: mean of r_s, in displacement units.
    """

    mean: float
    swing: float
    after_one: float
    strength: float

    @property
    def oscillates(self) -> bool:
        """Whether d_s swings from update to update."""
        return self.after_one < OSCILLATING


def signs_of(differences: Sequence[float], strengths: Sequence[float]) -> Signs:
    """Return what d_s and r_s of all updates say.

    Raises:
        UsageError: no updates.
    """
    if not len(differences):
        raise UsageError("no update was kept, so its curves say nothing.")
    late = np.asarray(differences[len(differences) // 2 :], dtype=np.float64)
    after_one = [*autocorrelation(late.tolist(), 1), 0.0][1]
    strength = float(np.mean(strengths[len(strengths) // 2 :]))
    return Signs(float(late.mean()), float(late.std()), after_one, strength)


def draw_curves(history: Sequence[Update], path: Path) -> None:
    """Draw d_s, r_s and their autocorrelation (Nijkamp et al. 2019, figure 4) to a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    series = {
        "d_s: energy difference / T": [u.energy_difference for u in history],
        "r_s: drift a step": [u.gradient_strength for u in history],
    }
    for row, (name, values) in zip(axes, series.items(), strict=True):
        row[0].plot([u.number for u in history], values, linewidth=0.5)
        row[0].set(title=name, xlabel="update")
        row[1].stem(autocorrelation(values[len(values) // 2 :]), markerfmt=" ", basefmt="k-")
        row[1].set(title="autocorrelation, second half", xlabel="lag")
    with atomic(path) as partial:
        figure.savefig(partial, dpi=120)


def long_chains(
    energy: Energy, images: Tensor, settings: LangevinSettings, lengths: Sequence[int], seed: int
) -> dict[int, Tensor]:
    """Run chains from `images` `[b, C, H, W]` in [-1, 1] and return them at each length."""
    trace = Trace()
    keys = chain_keys(seed, "long chains", range(len(images)), range(1))[0].to(images.device)
    longest = LangevinSettings(
        steps=max(lengths), step_size=settings.step_size, temperature=settings.temperature
    )
    with in_eval_mode(modules_of(energy)):
        run_chain(
            images,
            KeyedNoise(keys),
            energy=energy,
            settings=longest,
            trace=trace,
            snapshots={0, *lengths},
        )
    return trace.snapshots


def save_grid(rows: Sequence[Tensor], path: Path, scale: int = 2) -> None:
    """Save rows of images in [-1, 1], each `[columns, C, H, W]`, as one picture.

    A row shorter than the longest is filled with black.
    """
    from PIL import Image

    columns = max(len(row) for row in rows)
    blank = torch.full_like(rows[0][0], -1.0)
    lines = [torch.cat([*row, *[blank] * (columns - len(row))], dim=2) for row in rows]
    pixels = ((torch.cat(lines, dim=1).float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    size = (picture.width * scale, picture.height * scale)
    with atomic(path) as partial:
        picture.resize(size, Image.Resampling.NEAREST).save(partial)
