"""How robust is this model, on these images, under this protocol."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.defense import as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.flags import Evidence, raise_flags
from ebm_defense.eval.measures import measure
from ebm_defense.eval.members import fitting_gradient
from ebm_defense.eval.probe import probe
from ebm_defense.eval.protocol import Protocol, Through, get_protocol
from ebm_defense.eval.records import RunFolder, settings_of
from ebm_defense.eval.report import Report
from ebm_defense.eval.runner import Job, planned_steps, run
from ebm_defense.images import check_images, check_labels

DEFAULT_PROTOCOL = "quick"
DEFAULT_JUDGE_REPLICATES = 150


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    protocol: str | Protocol | None = None,
    *,
    attacks: Sequence[Attack] | None = None,
    judge_replicates: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Report:
    """Measure natural and robust accuracy of a model, judged on fresh random draws.

    Args:
        model: a `PurifiedClassifier`, or any classifier of [0, 1] images.
        images: `[N, C, H, W]` float in [0, 1].
        labels: true classes `[N]`.
        protocol: a name in `PROTOCOLS` or a `Protocol`; "quick" unless `attacks` are given.
        attacks: attacks instead of the protocol's.
        judge_replicates: fresh draws of a verification instead of the protocol's (150 if there is
            none).
        seed: seed of every stream; the same command draws the same noise.
        out: a run folder; a run cut short goes on from its last finished shard of 32 images.

    Returns:
        The report: tables, per-image records, adversarial images.

    Raises:
        UsageError: images outside [0, 1] or NaN, labels or shapes the model cannot take, a
            setting out of range, a folder that cannot be written or holds another run.
    """
    check_images(images)
    check_labels(labels, images)
    if not len(images):
        raise UsageError("there are no images to evaluate.")
    defense = as_defense(model)
    probe(defense, images, labels)
    chosen = _protocol(
        protocol, attacks, judge_replicates, partial(fitting_gradient, defense, images)
    )
    job = Job(defense=defense, images=images, labels=labels, protocol=chosen, seed=seed)
    settings = settings_of(defense, images, labels, chosen, seed)
    settings["budget"] = {"chain_steps_an_image": planned_steps(job)}
    folder = None if out is None else RunFolder(out, settings)
    begun = time.perf_counter()
    (records, adversarial), meter = run(job, folder)
    measures = measure(defense, images, labels, chosen.attacks, seed)
    report = Report(
        settings=settings,
        protocol=chosen,
        records=records,
        adversarial=adversarial,
        flags=raise_flags(Evidence(protocol=chosen, records=records, measures=measures)),
        chain_steps=meter.steps,
        seconds=meter.seconds | {"all": time.perf_counter() - begun},
    )
    if folder is not None:
        folder.finish((records, adversarial), {"seconds": report.seconds, "steps": meter.steps})
        report.save(folder.path)
    return report


def _protocol(
    protocol: str | Protocol | None,
    attacks: Sequence[Attack] | None,
    judge_replicates: int | None,
    through: Through,
) -> Protocol:
    if attacks is not None:
        if protocol is not None:
            raise UsageError("give a protocol or attacks, not both.")
        replicates = DEFAULT_JUDGE_REPLICATES if judge_replicates is None else judge_replicates
        return Protocol(name="custom", attacks=tuple(attacks), judge_replicates=replicates)
    named = (
        protocol
        if isinstance(protocol, Protocol)
        else get_protocol(protocol or DEFAULT_PROTOCOL, through=through)
    )
    if judge_replicates is None:
        return named
    return dataclasses.replace(named, judge_replicates=judge_replicates)
