"""The evaluation itself: phase after phase, shard after shard."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import pandas as pd

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.errors import UsageError
from ebm_defense.eval import published, selected
from ebm_defense.eval.job import Columns, Job, Meter, Part
from ebm_defense.eval.judging.rules import AsDeployed
from ebm_defense.eval.memory import chains_restored
from ebm_defense.eval.protocols.protocol import SELECTED
from ebm_defense.eval.storage.run_folder import Done, MemoryStore, RunFolder, total
from ebm_defense.eval.storage.settings import Shard, join
from ebm_defense.eval.workers import ALONE, Workers

SHARD = 32
STEPS_AT_RISK = 500_000_000
"""Chain-steps of one batch at most, about ten minutes of a large GPU: shards are saved as their
batch ends, and a kill loses the batch that it meets."""


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that stands to the end of every attack.

    Attacks that are `open_ended` may cost more, as do verifications of every look.
    """
    if judged_once(job):
        return selected.planned_steps(job)
    return published.planned_steps(job)


def judged_once(job: Job) -> bool:
    """Return whether one image of each is judged, and that once; else as published."""
    return job.protocol.looks == SELECTED or isinstance(job.protocol.verdict, AsDeployed)


def run(
    job: Job, shelf: MemoryStore | RunFolder, workers: Workers = ALONE, show: bool | None = None
) -> Done:
    """Run this process's shards of a job, and return all that the shelf then holds.

    Shards that are finished already are checked first, before any long work, and used.
    """
    starts = workers.in_folder(range(0, len(job.labels), SHARD))
    for start in starts:
        shelf.load(start)
    todo = [s for s in workers.of_rank(starts) if shelf.load(s) is None]
    with chains_restored(job.defense):
        _run_shards(job, todo, shelf, show if workers.leads else False)
    shelf.wait(starts, workers)
    finished = [done for start in starts if (done := shelf.load(start)) is not None]
    return gather(finished)


def gather(finished: Sequence[Done]) -> Done:
    """Join finished shards, in the order given.

    Raises:
        UsageError: there are none.
    """
    if not finished:
        raise UsageError("no images are left for this shard; split the run into fewer.")
    return Done(join([done.shard for done in finished]), total(done.costs for done in finished))


def _run_shards(
    job: Job, todo: Sequence[int], shelf: MemoryStore | RunFolder, show: bool | None
) -> None:
    each, fitting = planned_steps(job), job.defense.packing.fitting
    parts = [range(start, min(start + SHARD, len(job.labels))) for start in todo]
    meter = Meter(total=each * sum(map(len, parts)), show=show)
    try:
        while parts:
            count = shards_at_once(job)
            batch, parts = parts[:count], parts[count:]
            done = fitting(partial(_counted, job, [i for ids in batch for i in ids], meter))
            for ids, shard in zip(batch, split(done, [len(ids) for ids in batch]), strict=True):
                shelf.save(ids.start, shard)
            meter.settle(each * sum(map(len, parts)))
    finally:
        meter.close()


def shards_at_once(job: Job) -> int:
    """Return how many shards are run as one batch: as many as fill the chains that run at a time.

    So a GPU is not left with the few chains of one shard's last standing images; but no more than
    may be lost. Noise belongs to an image, so the records do not depend on it.
    """
    most = max(attack.replicates for attack in job.protocol.attacks)
    chains = SHARD * len(attack_replicates(most, job.defense))
    filling = job.defense.packing.aim(job.images.device) // chains
    safe = STEPS_AT_RISK // (SHARD * max(planned_steps(job), 1))
    return max(1, min(filling, safe))


def _counted(job: Job, ids: Sequence[int], meter: Meter) -> Done:
    meter.take()  # what a try that ran out of memory has cost is no cost of the shard
    return Done(run_shard(job, ids, meter), meter.take())


def split(done: Done, sizes: Sequence[int]) -> list[Done]:
    """Cut what was run as one batch into shards of so many images, the cost in proportion."""
    ends = list(itertools.accumulate(sizes))
    return [_cut(done, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def _cut(done: Done, rows: slice) -> Done:
    records, images = done.shard
    share = (rows.stop - rows.start) / len(records)
    return Done(
        (
            records.iloc[rows].reset_index(drop=True),
            {name: found[rows].clone() for name, found in images.items()},
        ),
        {
            what: {phase: cost * share for phase, cost in phases.items()}
            for what, phases in done.costs.items()
        },
    )


def run_shard(job: Job, ids: Sequence[int], meter: Meter) -> Shard:
    """Evaluate the images of `ids`: undefended, clean, then each attack in the protocol's order."""
    part = Part(job.images[list(ids)], job.labels[list(ids)], list(ids))
    run_part = selected.run_selected if judged_once(job) else published.run_published
    columns, adversarial = run_part(job, part, meter)
    numbers: Columns = {"image": part.ids, "label": part.labels.tolist()}
    return pd.DataFrame(numbers | columns), adversarial
