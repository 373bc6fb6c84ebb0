"""The evaluation itself: phase after phase, shard after shard."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_defense.attacks.base import Attack, Proposal, attack_replicates, cost, lenient
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.definitions import definition_columns
from ebm_defense.eval.judging.judge import (
    Judge,
    Stream,
    Verdict,
    draw_logits,
    uncounted,
)
from ebm_defense.eval.memory import chains_restored
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.storage.run_folder import Costs, Done, MemoryStore, RunFolder, total
from ebm_defense.eval.storage.settings import Shard, join
from ebm_defense.eval.workers import ALONE, Workers
from ebm_defense.noise import derive_seed

SHARD = 32
STEPS_AT_RISK = 500_000_000
"""Chain-steps of one batch at most, about ten minutes of a large GPU: shards are saved as their
batch ends, and a kill loses the batch that it meets."""
Columns = dict[str, Sequence[object]]


@dataclass(kw_only=True)
class Meter:
    """Counts chain-steps and seconds by phase, and shows the time left.

    Attributes:
        total: chain-steps if every image stands to the end.
        show: whether to draw a progress bar; None draws it on a terminal.
    """

    total: int
    show: bool | None = None
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        disable = None if self.show is None else not self.show
        self.bar = tqdm(
            total=self.total, unit="step", unit_scale=True, disable=disable, smoothing=0.02
        )
        self.phase, self.since = "", time.perf_counter()

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now
        self.bar.set_description(phase)

    def count(self, steps: int) -> None:
        """Count chain-steps of the phase."""
        self.steps[self.phase] = self.steps.get(self.phase, 0) + steps
        self.bar.update(steps)

    def take(self) -> Costs:
        """End the phase, and return and forget what was counted since the last time."""
        self.enter("")
        costs: Costs = {"steps": dict(self.steps), "seconds": self.seconds}
        self.steps, self.seconds = {}, {}
        return costs

    def settle(self, planned: int) -> None:
        """Correct the total once a shard is done: broken images cost less than planned."""
        self.bar.total = self.bar.n + planned
        self.bar.refresh()

    def close(self) -> None:
        """End the bar."""
        self.bar.close()


@dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation of one model on one set of images: everything the records depend on."""

    defense: PurifiedClassifier
    images: Tensor
    labels: Tensor
    protocol: Protocol
    seed: int

    def stream(self, purpose: str, replicates: int, meter: Meter) -> Stream:
        """Return a stream of this job's own, for one purpose."""
        return Stream(self.seed, purpose, replicates, meter.count)

    def check(self, classes: int) -> None:
        """Refuse, before any long work, attacks that cannot attack a model of so many classes.

        Raises:
            UsageError: what an attack's own `check` refuses.
        """
        for attack in self.protocol.attacks:
            attack.check(self.defense, self.images, classes)

    @cached_property
    def bare(self) -> PurifiedClassifier | None:
        """The undefended classifier beside a defended one; None where nothing is defended."""
        if self.defense.purifier.identity:
            return None
        bare = self.defense.bare()
        bare.check_deterministic(self.images)
        return bare


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that stands to the end of every attack, unverified.

    Attacks that are `open_ended` may cost more.
    """
    purifier, protocol = job.defense.purifier, job.protocol
    first = attack_replicates(protocol.attacks[-1].replicates, job.defense)
    judge = attack_replicates(protocol.judge_replicates, job.defense)
    fresh = len(judge) * (1 + (1 if protocol.ensemble else len(protocol.attacks)))
    clean = (len(first) + fresh) * purifier.chain_steps
    return clean + sum(a.chain_steps(job.defense) for a in protocol.attacks)


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


class Part(NamedTuple):
    """Some of a job's images, with their labels and their numbers in the job."""

    images: Tensor
    labels: Tensor
    ids: list[int]


def run_shard(job: Job, ids: Sequence[int], meter: Meter) -> Shard:
    """Evaluate the images of `ids`: undefended, clean, then each attack in the protocol's order."""
    part = Part(job.images[list(ids)], job.labels[list(ids)], list(ids))
    columns: Columns = {"image": part.ids, "label": part.labels.tolist()}
    adversarial: dict[str, Tensor] = {}
    if job.bare is not None:
        meter.enter("undefended")
        columns |= _undefended(job, job.bare, part, meter)
    meter.enter("clean")
    columns |= _clean(job, part, meter)
    natural = _natural(job, part, meter)
    columns["natural"] = natural.stands.int().tolist()
    columns["natural: undecided"] = natural.undecided.int().tolist()
    before = natural
    for number, attack in enumerate(job.protocol.attacks):
        meter.enter(attack.name)
        name = attack_column(number, attack)
        verdict = _attack(job, name, attack, part, before, meter)
        size = attack.threat.size(verdict.images, part.images)
        columns |= _verdict_columns(name, verdict) | {f"{name}: size": size.tolist()}
        if not job.protocol.ensemble or number == len(job.protocol.attacks) - 1:
            columns |= _define(job, name, part._replace(images=verdict.images), meter)
        before = verdict if job.protocol.ensemble else natural
        adversarial[name] = verdict.images
    return pd.DataFrame(columns), adversarial


def attack_column(number: int, attack: Attack) -> str:
    """Return the name under which records keep an attack."""
    return f"{number} {attack.name}"


def _undefended(job: Job, bare: PurifiedClassifier, part: Part, meter: Meter) -> Columns:
    with torch.no_grad():
        right = bare.classify(part.images).argmax(-1) == part.labels
    attack = job.protocol.attacks[-1].direct
    judge = _judge(job, part, "undefended", attack.threat, meter, defense=bare)
    judge.strike((~right).nonzero().flatten())
    seed = derive_seed(job.seed, "undefended")
    attack.run(bare, part.images, part.labels, ids=part.ids, seed=seed, judge=judge)
    return {
        "undefended_clean": right.int().tolist(),
        "undefended_attacked": judge.verdict.stands.int().tolist(),
    }


def _clean(job: Job, part: Part, meter: Meter) -> Columns:
    """Clean accuracy by one stage of H draws."""
    draws = job.protocol.judge_replicates
    logits = draw_logits(job.defense, part.images, part.ids, job.stream("clean", draws, meter))
    refuse_nan(logits, part.ids)
    right = job.defense.combine(logits).argmax(-1) == part.labels
    votes = (logits.argmax(-1) == part.labels).float().mean(0)
    found: Columns = {"clean": right.int().tolist(), "clean_votes": votes.tolist()}
    return found | definition_columns("clean", logits, part.labels)


def _define(job: Job, name: str, part: Part, meter: Meter) -> Columns:
    """Draw final images afresh, once for every definition of robust accuracy."""
    stream = job.stream(f"definitions {name}", job.protocol.judge_replicates, meter)
    logits = draw_logits(job.defense, part.images, part.ids, stream)
    refuse_nan(logits, part.ids)
    return definition_columns(name, logits, part.labels)


def _natural(job: Job, part: Part, meter: Meter) -> Verdict:
    """Clean accuracy by the protocol's rule, as attacked images are judged."""
    looks = job.stream("natural look", job.protocol.attacks[-1].replicates, meter)
    first = draw_logits(job.defense, part.images, part.ids, looks._replace(hear=uncounted))
    judge = _judge(job, part, "natural", None, meter)
    judge(Proposal(0, torch.arange(len(part.labels)), part.images, first))
    return judge.verdict


def _attack(
    job: Job, name: str, attack: Attack, part: Part, before: Verdict, meter: Meter
) -> Verdict:
    """Attack the images that stood before; the others keep the images that they had."""
    judge = _judge(job, part, f"attack {name}", attack.threat, meter)
    judge.strike((~before.stands).nonzero().flatten())
    judge.doubt(before.undecided.nonzero().flatten())
    alive = before.stands.nonzero().flatten()
    left = Part(part.images[alive], part.labels[alive], [part.ids[i] for i in alive.tolist()])

    def hear(proposal: Proposal) -> Tensor:
        return judge(proposal._replace(rows=alive[proposal.rows]))

    RUNS[job.protocol.looks](job, name, attack, left, hear, meter)
    stood = before.stands.view(-1, 1, 1, 1).to(part.images.device)
    found = judge.verdict
    return replace(found, images=torch.where(stood, found.images, before.images))


def _run_every(
    job: Job, name: str, attack: Attack, left: Part, hear: Heard, meter: Meter
) -> Tensor:
    """Run an attack whose every look comes before the judge."""
    seed = derive_seed(job.seed, f"attack {name}")
    return attack.run(job.defense, left.images, left.labels, ids=left.ids, seed=seed, judge=hear)


def _run_last(job: Job, name: str, attack: Attack, left: Part, hear: Heard, meter: Meter) -> Tensor:
    """Run an attack whose last images alone come before the judge, with a look of their own."""
    blind = torch.zeros(len(left.labels), dtype=torch.bool)

    def unheard(proposal: Proposal) -> Tensor:
        if proposal.blind is not None:
            blind[proposal.rows.cpu()] |= proposal.blind.cpu()
        meter.count(cost(proposal, job.defense))
        return lenient(proposal)

    x = _run_every(job, name, attack, left, unheard, meter)
    looks = Stream(job.seed, f"attack {name} last look", attack.replicates)
    logits = draw_logits(job.defense, x, left.ids, looks)
    hear(Proposal(attack.looks - 1, torch.arange(len(x)), x, logits, blind))
    return x


Heard = Callable[[Proposal], Tensor]
RUNS = {"every": _run_every, "last": _run_last}
"""How attacks are run, by the protocol's `looks`."""


def _judge(
    job: Job,
    part: Part,
    purpose: str,
    threat: ThreatModel | None,
    meter: Meter,
    defense: PurifiedClassifier | None = None,
) -> Judge:
    return Judge(
        defense or job.defense,
        part.images,
        part.labels,
        ids=part.ids,
        threat=threat,
        replicates=job.protocol.judge_replicates,
        seed=job.seed,
        purpose=purpose,
        rule=job.protocol.verdict,
        count=meter.count,
    )


def _verdict_columns(name: str, verdict: Verdict) -> Columns:
    return {
        f"{name}: stands": verdict.stands.int().tolist(),
        f"{name}: broken at": verdict.broken_at.tolist(),
        f"{name}: votes": verdict.votes.tolist(),
        f"{name}: verified on": verdict.draws.tolist(),
        f"{name}: undecided": verdict.undecided.int().tolist(),
        f"{name}: attack right": verdict.seen[0].tolist(),
        f"{name}: attack draws": verdict.seen[1].tolist(),
        f"{name}: blind": verdict.blind.tolist(),
    }
