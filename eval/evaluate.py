"""How robust is this model, on these images, under this protocol."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_defense.attacks.base import Attack, trying
from ebm_defense.attacks.gradients.registry import choose_auto
from ebm_defense.defense import as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.judge import refuse_few
from ebm_defense.eval.judging.sanity_checks import (
    SanityChecks,
    run_sanity_checks,
    save_sanity_checks,
)
from ebm_defense.eval.protocols.protocol import (
    SELECTED,
    Protocol,
    get_protocol,
    restore_protocol,
)
from ebm_defense.eval.reporting.flags.registry import log_flags
from ebm_defense.eval.reporting.report import Report, report_of
from ebm_defense.eval.running.job import Job
from ebm_defense.eval.running.memory import chains_restored
from ebm_defense.eval.running.runner import planned_steps, run
from ebm_defense.eval.running.workers import ALONE, Workers
from ebm_defense.eval.storage.behaviour import behaviour
from ebm_defense.eval.storage.run_folder import SETTINGS, Done, MemoryStore, RunFolder, read_toml
from ebm_defense.eval.storage.settings import settings_of
from ebm_defense.interface.inputs import read_batch
from ebm_defense.interface.modes import evaluating
from ebm_defense.interface.numbers import whole
from ebm_defense.storage.serialize import describe

LOG = logging.getLogger("ebm_defense.eval")
DEFAULT_PROTOCOL = "quick"
DEFAULT_JUDGE_REPLICATES = 150


def evaluate(
    model: Callable[[Tensor], Tensor],
    images: Any,
    labels: Any = None,
    protocol: str | Protocol | None = None,
    *,
    attacks: Sequence[Attack] | None = None,
    judge_replicates: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    workers: Workers = ALONE,
) -> Report:
    """Measure natural and robust accuracy of a model, judged on fresh random draws.

    Args:
        model: a `PurifiedClassifier`, or any classifier of [0, 1] images.
        images: `[N, C, H, W]` float in [0, 1], as `read_batch` takes them.
        labels: true classes `[N]`; None where `images` is a data set or a data loader.
        protocol: a name in `PROTOCOLS` or a `Protocol`; "quick" unless `attacks` are given.
        attacks: attacks instead of the protocol's.
        judge_replicates: fresh draws of a judgement instead of the protocol's (150 if there is
            none).
        seed: seed of every stream; the same command draws the same noise.
        out: a run folder; a run cut short goes on from its last finished shard of 32 images.
        workers: which shards this process does, and who shares `out` with it.

    Returns:
        The report: tables, per-image records, adversarial images.

    Raises:
        UsageError: images outside [0, 1] or NaN, labels or shapes the model cannot take, a
            setting out of range, fewer judge replicates than one prediction averages, a folder
            that cannot be written, is in use or holds another run.
        LostWorkerError: another process of this run died.
    """
    images, labels = read_batch(images, labels)
    if not len(images):
        raise UsageError("there are no images to evaluate.")
    defense = as_defense(model)
    asked = _protocol(protocol, attacks, judge_replicates)
    models = [defense, *(model for attack in asked.attacks for model in attack.models)]
    with evaluating(defense, asked, trying=trying(models, images)):
        classes = check_model(defense, images, labels)
        fitting = asked.fitting(classes, stochastic=defense.stochastic)
        chosen = choose_auto(fitting, defense, images)
        if out is not None:
            chosen = as_begun(chosen, Path(out).expanduser())
        refuse_few(defense, chosen.verdict, chosen.judge_replicates)
        number = whole(seed, "the seed")
        job = Job(defense=defense, images=images, labels=labels, protocol=chosen, seed=number)
        job.check(classes)
        store = _store(job, out, workers)
        with store.claimed():
            report = _reported(job, run(job, store, workers), store, workers)
    log_flags(report.flags)
    return report


def _store(job: Job, out: str | Path | None, workers: Workers) -> MemoryStore | RunFolder:
    """Return what keeps the finished shards: a folder, or memory."""
    settings = settings_of(job.defense, job.images, job.labels, job.protocol, job.seed)
    settings["budget"] = {"chain_steps_an_image": planned_steps(job)}
    if workers.parts > 1:
        settings["shard"] = f"{workers.part}/{workers.parts}"
    if out is None:
        return MemoryStore(settings)
    data = {"images": job.images, "labels": job.labels}
    answers = behaviour(job.defense, job.images, job.protocol.attacks)
    return RunFolder(out, settings, data, workers, answers)


def as_begun(protocol: Protocol, folder: Path) -> Protocol:
    """Return a protocol as a run that an older version began in a folder has it.

    Such a run goes on by the rule under which it was begun, so that its images are all judged
    alike. A protocol that differs in anything else is returned as it is, and refused later.
    """
    file = folder / SETTINGS
    if protocol.looks != SELECTED or not file.is_file():
        return protocol
    try:
        kept = read_toml(file)["protocol"]
        begun = restore_protocol(kept)
    except (UsageError, KeyError):
        return protocol
    older = dataclasses.replace(
        protocol, verdict=begun.verdict, looks=begun.looks, selection=begun.selection
    )
    if begun.looks == SELECTED or describe(older) != kept:
        return protocol
    LOG.warning(
        "the run in %s was begun by an older version and goes on by its %s rule, at every look; "
        "name another folder to have one selected image judged.",
        folder,
        begun.verdict.name,
    )
    return older


def _reported(job: Job, done: Done, store: MemoryStore | RunFolder, workers: Workers) -> Report:
    """Report what was found; the process that leads writes the end of a folder."""
    folder = store if isinstance(store, RunFolder) else None
    sanity_checks = _sanity_checks(job) if folder is None or workers.leads else None
    answers = None if folder is None else folder.behaviour
    report = report_of(
        done, store.settings, job.protocol, job.images, sanity_checks, answers=answers
    )
    if folder is not None and sanity_checks is not None:
        save_sanity_checks(folder.path, sanity_checks)
        report.save(folder.path)
        folder.finish(*done)
    return report


def _sanity_checks(job: Job) -> SanityChecks:
    """Check the model for flags, with as many chains at a time as fit."""
    protocol = job.protocol
    with chains_restored(job.defense):
        for attempt in job.defense.packing.tries():
            with attempt:
                found = run_sanity_checks(
                    job.defense, job.images, job.labels, protocol.attacks, job.seed
                )
    return found


def _protocol(
    protocol: str | Protocol | None,
    attacks: Sequence[Attack] | None,
    judge_replicates: int | None,
) -> Protocol:
    if attacks is not None:
        if protocol is not None:
            raise UsageError("give a protocol or attacks, not both.")
        replicates = DEFAULT_JUDGE_REPLICATES if judge_replicates is None else judge_replicates
        return Protocol(name="custom", attacks=tuple(attacks), judge_replicates=replicates)
    named = (
        protocol if isinstance(protocol, Protocol) else get_protocol(protocol or DEFAULT_PROTOCOL)
    )
    if judge_replicates is None:
        return named
    return dataclasses.replace(named, judge_replicates=judge_replicates)
