"""The evaluation itself: phase after phase, shard after shard."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing

import pandas as pd

from ebm_defense.attacks.base import attack_replicates
from ebm_defense.errors import UsageError
from ebm_defense.eval.running import published, selected
from ebm_defense.eval.running.job import Job, Meter, Part
from ebm_defense.eval.running.memory import chains_restored
from ebm_defense.eval.running.workers import ALONE, Workers
from ebm_defense.eval.storage.columns import IMAGE, LABEL, Columns
from ebm_defense.eval.storage.run_folder import Done, MemoryStore, RunFolder, total
from ebm_defense.eval.storage.settings import join

SHARD = 32
STEPS_AT_RISK = 500_000_000
"""Chain-steps of one batch at most, about ten minutes of a large GPU: shards are saved as their
batch ends, and a kill loses the batch that it meets."""


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that stands to the end of every attack.

    Attacks that are `open_ended` may cost more, as do verifications of every look.
    """
    if job.protocol.judged_once:
        return selected.planned_steps(job)
    return published.planned_steps(job)


def run(
    job: Job, store: MemoryStore | RunFolder, workers: Workers = ALONE, show: bool | None = None
) -> Done:
    """Run this process's shards of a job, and return all that the store then holds.

    Shards that are finished already are checked first, before any long work, and used.
    """
    starts = workers.in_folder(range(0, len(job.labels), SHARD))
    for start in starts:
        store.load(start)
    todo = [s for s in workers.of_rank(starts) if store.load(s) is None]
    batches, left = _batches(job, todo), sum(len(_ids(job, start)) for start in todo)
    meter = Meter(total=planned_steps(job) * left, show=show if workers.leads else False)
    with chains_restored(job.defense), closing(meter):
        for batch in batches:
            every = list(itertools.chain.from_iterable(batch))
            for attempt in job.defense.packing.tries():
                with attempt:
                    found = run_shard(job, every, meter)
            for ids, shard in zip(batch, split(found, list(map(len, batch))), strict=True):
                store.save(ids[0], shard)
                left -= len(ids)
            meter.settle(planned_steps(job) * left)
    store.wait(starts, workers)
    finished = [done for start in starts if (done := store.load(start)) is not None]
    return gather(finished)


def _ids(job: Job, start: int) -> list[int]:
    """Return the numbers of a shard's images."""
    return list(range(start, min(start + SHARD, len(job.labels))))


def _batches(job: Job, starts: Sequence[int]) -> Iterator[list[list[int]]]:
    """Yield the images of so many shards at a time as are run as one batch, shard by shard."""
    shards = deque(_ids(job, start) for start in starts)
    while shards:
        yield [shards.popleft() for _ in range(min(shards_at_once(job), len(shards)))]


def gather(finished: Sequence[Done]) -> Done:
    """Join finished shards, in the order given.

    Raises:
        UsageError: there are none.
    """
    if not finished:
        raise UsageError("no images are left for this shard; split the run into fewer.")
    return Done(join([done.shard for done in finished]), total(done.costs for done in finished))


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


def run_shard(job: Job, ids: Sequence[int], meter: Meter) -> Done:
    """Evaluate the images of `ids`: undefended, clean, then each attack in the protocol's order."""
    meter.take()  # what a try that ran out of memory has cost is no cost of the images
    part = Part(job.images[list(ids)], job.labels[list(ids)], list(ids))
    run_part = selected.run_selected if job.protocol.judged_once else published.run_published
    columns, adversarial = run_part(job, part, meter)
    numbers: Columns = {IMAGE: part.ids, LABEL: part.labels.tolist()}
    return Done((pd.DataFrame(numbers | columns), adversarial), meter.take())
