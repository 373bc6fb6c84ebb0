"""How accurate is a defense on corrupted images: the mean over corruptions and severities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_defense.attacks.base import trying
from ebm_defense.attacks.corruptions.made import CORRUPTIONS, SEVERITIES, check_corruption, corrupt
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.data import Images
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.eval.reporting.captions import corruptions_caption
from ebm_defense.eval.reporting.corruption_report import CorruptionReport
from ebm_defense.eval.storage.behaviour import behaviour
from ebm_defense.eval.storage.columns import CLEAN
from ebm_defense.eval.storage.run_folder import Done, MemoryStore, RunFolder
from ebm_defense.eval.storage.settings import judge_settings
from ebm_defense.interface.inputs import read_batch
from ebm_defense.interface.modes import evaluating
from ebm_defense.interface.numbers import whole
from ebm_defense.interface.outputs import logits_of
from ebm_defense.storage.fingerprint import digest

BATCH = 64

Make = Callable[[str, int], Images]
"""(corruption, severity) → the corrupted images, always the same ones in the same order."""


def evaluate_corruptions(
    model: Callable[[Tensor], Tensor],
    images: Any,
    labels: Any = None,
    *,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    make: Make | None = None,
    source: str = "made here",
    replicates: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> CorruptionReport:
    """Measure accuracy on corrupted images, by the defense's rule on fresh draws, in one stage.

    Args:
        model: a `PurifiedClassifier`, or any classifier of [0, 1] images.
        images: the clean ones, `[N, C, H, W]` in [0, 1], as `read_batch` takes them.
        labels: true classes `[N]`; None where `images` is a data set or a data loader.
        corruptions: names; all fifteen if not given.
        severities: 1 to 5.
        make: gives the corrupted images, such as files hold them; made by `corrupt` if not given.
        source: where they come from, for the settings and the caption.
        replicates: fresh draws an image; the defense's own number if not given.
        seed: seed of the corruptions and of the defense's draws.
        out: a run folder; a run cut short goes on from its last finished corruption and severity.

    Raises:
        UsageError: no images, an unknown corruption or severity, images the model cannot take, or
            a folder that holds another run.
    """
    images, labels = read_batch(images, labels)
    defense, seed = as_defense(model), whole(seed, "the seed")
    names = list(CORRUPTIONS) if corruptions is None else list(corruptions)
    _check(images, names, severities, made_here=make is None)
    with evaluating(defense, trying=trying([defense], images)):
        check_model(defense, images, labels)
        draws = defense.replicates if replicates is None else whole(replicates, "replicates")
        settings = {
            "kind": "corruptions",
            "seed": seed,
            "replicates": draws,
            "corruptions": names,
            "severities": list(severities),
            "source": source,
            **_judged_on(defense, images, labels),
        }
        cells = [(name, severity) for name in names for severity in severities]
        if make is None:
            cells, make = [(CLEAN, 0), *cells], _maker(images, labels, seed)
        measured = partial(_measure, defense, make, draws=draws, seed=seed)
        if out is None:
            return _report(cells, measured, MemoryStore(), settings)
        return _saved(cells, measured, _folder(out, settings, defense, Images(images, labels)))


def _judged_on(defense: PurifiedClassifier, images: Tensor, labels: Tensor) -> dict[str, Any]:
    data = {"images": len(images), "sha256": digest([images, labels])}
    return {"defense": judge_settings(defense, images), "data": data}


def _saved(
    cells: list[tuple[str, int]],
    measured: Callable[[tuple[str, int]], pd.DataFrame],
    folder: RunFolder,
) -> CorruptionReport:
    with folder.claimed():
        report = _report(cells, measured, folder, folder.settings)
        report.save(folder.path)
    return report


def _folder(
    out: str | Path, settings: dict[str, Any], defense: PurifiedClassifier, data: Images
) -> RunFolder:
    return RunFolder(out, settings, data._asdict(), behaviour=behaviour(defense, data.images))


def _report(
    cells: list[tuple[str, int]],
    measured: Callable[[tuple[str, int]], pd.DataFrame],
    folder: RunFolder | MemoryStore,
    settings: dict[str, Any],
) -> CorruptionReport:
    records = pd.concat(_kept(cells, measured, folder), ignore_index=True)
    return CorruptionReport(records=records, caption=corruptions_caption(settings))


def _maker(images: Tensor, labels: Tensor, seed: int) -> Make:
    def make(name: str, severity: int) -> Images:
        if name == CLEAN:
            return Images(images, labels)
        return Images(corrupt(images, name, severity, seed=seed), labels)

    return make


def _kept(
    cells: list[tuple[str, int]],
    measured: Callable[[tuple[str, int]], pd.DataFrame],
    folder: RunFolder | MemoryStore,
) -> list[pd.DataFrame]:
    """Measure each corruption and severity, keeping and reusing what is in the folder."""
    parts = []
    for number, cell in enumerate(tqdm(cells, unit="cell", disable=None)):
        kept = folder.load(number)
        if kept is None:
            kept = Done((measured(cell), {}), {})
            folder.save(number, kept)
        parts.append(kept.shard[0].assign(corruption=cell[0]))
    return parts


def _check(
    images: Tensor, names: Sequence[str], severities: Sequence[int], *, made_here: bool
) -> None:
    if not len(images) or not names or not severities:
        raise UsageError("there must be at least one image, one corruption and one severity.")
    for severity in severities:
        check_corruption(next(iter(CORRUPTIONS)), severity)
    for name in names if made_here else ():
        check_corruption(name)


def _measure(
    defense: PurifiedClassifier, make: Make, cell: tuple[str, int], *, draws: int, seed: int
) -> pd.DataFrame:
    """Classify one corruption's images, in batches, and return their records."""
    data, bare, parts = make(*cell), defense.undefended, []
    for rows in torch.arange(len(data.labels)).split(BATCH):
        images, labels, ids = data.images[rows], data.labels[rows], rows.tolist()
        stream = Stream(seed, f"corrupted {cell[0]} {cell[1]}", draws)
        logits = draw_logits(defense, images, ids, stream)
        refuse_nan(logits, ids)
        with torch.no_grad():
            undefended = logits_of(bare(images), images).argmax(-1) == labels
        right = defense.combine(logits).argmax(-1) == labels
        judged = {"defended": right.int().tolist(), "undefended": undefended.int().tolist()}
        parts.append(pd.DataFrame({"image": ids, "label": labels.tolist(), **judged}))
    records = pd.concat(parts, ignore_index=True)
    records.insert(0, "corruption", cell[0])
    records.insert(1, "severity", cell[1])
    return records
