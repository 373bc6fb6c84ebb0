"""The evaluation itself: phase after phase, shard after shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_defense.attacks.base import Attack, Proposal, attack_replicates
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.eval.protocol import Protocol
from ebm_defense.eval.records import RunFolder, Shard, join
from ebm_defense.eval.verdict import Judge, draw_logits, refuse_nan
from ebm_defense.noise import derive_seed
from ebm_defense.purifiers import NoPurifier

SHARD = 32


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

    def settle(self, planned: int) -> None:
        """Correct the total once a shard is done: broken images cost less than planned."""
        self.bar.total = self.bar.n + planned
        self.bar.refresh()

    def close(self) -> None:
        """End the last phase and the bar."""
        self.enter("")
        self.bar.close()


@dataclass(frozen=True, kw_only=True)
class Job:
    """An evaluation of one model on one set of images: everything the records depend on."""

    defense: PurifiedClassifier
    images: Tensor
    labels: Tensor
    protocol: Protocol
    seed: int

    @property
    def bare(self) -> PurifiedClassifier | None:
        """The undefended classifier beside a defended one; None where nothing is defended."""
        if isinstance(self.defense.purifier, NoPurifier):
            return None
        return as_defense(self.defense.undefended)


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that stands to the end of every attack, unverified."""
    purifier, protocol = job.defense.purifier, job.protocol
    first = attack_replicates(protocol.attacks[-1].replicates, job.defense)
    judge = attack_replicates(protocol.judge_replicates, job.defense)
    clean = (len(first) + len(judge)) * purifier.chain_steps
    return clean + sum(a.chain_steps(job.defense) for a in protocol.attacks)


def run(job: Job, folder: RunFolder | None, show: bool | None = None) -> tuple[Shard, Meter]:
    """Run a job shard by shard, keeping and reusing shards in `folder`."""
    each, count = planned_steps(job), len(job.labels)
    meter = Meter(total=each * count, show=show)
    shards: list[Shard] = []
    try:
        for start in range(0, count, SHARD):
            shard = folder.load_shard(start) if folder else None
            if shard is None:
                shard = run_shard(job, range(start, min(start + SHARD, count)), meter)
                if folder:
                    folder.save_shard(start, shard)
            shards.append(shard)
            meter.settle(each * (count - min(start + SHARD, count)))
    finally:
        meter.close()
    return join(shards), meter


def run_shard(job: Job, ids: range, meter: Meter) -> Shard:
    """Evaluate the images of `ids`: clean, undefended, then each attack in the protocol's order."""
    images, labels = job.images[ids.start : ids.stop], job.labels[ids.start : ids.stop]
    columns: dict[str, Sequence[object]] = {"image": ids, "label": labels.tolist()}
    adversarial: dict[str, Tensor] = {}
    if job.bare is not None:
        columns |= _undefended(job, job.bare, images, labels, ids, meter)
    clean, natural = _clean(job, images, labels, ids, meter)
    columns |= clean
    for number, attack in enumerate(job.protocol.attacks):
        found, proposed = _attack(job, number, attack, images, labels, ids, natural, meter)
        columns |= found
        adversarial[attack_column(number, attack)] = proposed
    return pd.DataFrame(columns), adversarial


def attack_column(number: int, attack: Attack) -> str:
    """Return the name under which records keep an attack."""
    return f"{number} {attack.name}"


def _undefended(
    job: Job, bare: PurifiedClassifier, images: Tensor, labels: Tensor, ids: range, meter: Meter
) -> dict[str, Sequence[object]]:
    meter.enter("undefended")
    with torch.no_grad():
        right = bare.classifier(images).argmax(-1) == labels
    attack = job.protocol.attacks[-1]
    judge = Judge(
        bare,
        images,
        labels,
        ids=ids,
        threat=attack.threat,
        replicates=1,
        seed=job.seed,
        purpose="undefended",
        count=meter.count,
    )
    judge.strike((~right).nonzero().flatten())
    seed = derive_seed(job.seed, "undefended")
    attack.run(bare, images, labels, ids=ids, seed=seed, judge=judge)
    return {
        "undefended_clean": right.int().tolist(),
        "undefended_attacked": judge.verdict.stands.int().tolist(),
    }


def _clean(
    job: Job, images: Tensor, labels: Tensor, ids: range, meter: Meter
) -> tuple[dict[str, Sequence[object]], Tensor]:
    """Natural accuracy, by one stage of H draws and by the published two-stage rule."""
    meter.enter("clean")
    draw = (job.defense, images, ids, job.seed)
    logits = draw_logits(*draw, "clean", job.protocol.judge_replicates, meter.count)
    refuse_nan(logits, ids)
    right = job.defense.combine(logits).argmax(-1) == labels
    replicates = job.protocol.attacks[-1].replicates
    first = draw_logits(*draw, "natural look", replicates)
    judge = Judge(
        job.defense,
        images,
        labels,
        ids=ids,
        threat=None,
        replicates=job.protocol.judge_replicates,
        seed=job.seed,
        purpose="natural",
        count=meter.count,
    )
    judge(Proposal(0, torch.arange(len(labels)), images, first))
    natural = judge.verdict.stands
    votes = (logits.argmax(-1) == labels).float().mean(0)
    columns: dict[str, Sequence[object]] = {
        "clean": right.int().tolist(),
        "clean_votes": votes.tolist(),
        "natural": natural.int().tolist(),
    }
    return columns, natural


def _attack(
    job: Job,
    number: int,
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    ids: range,
    natural: Tensor,
    meter: Meter,
) -> tuple[dict[str, Sequence[object]], Tensor]:
    column = attack_column(number, attack)
    meter.enter(attack.name)
    judge = Judge(
        job.defense,
        images,
        labels,
        ids=ids,
        threat=attack.threat,
        replicates=job.protocol.judge_replicates,
        seed=job.seed,
        purpose=f"attack {column}",
        count=meter.count,
    )
    judge.strike((~natural).nonzero().flatten())
    alive = natural.nonzero().flatten()

    def hear(proposal: Proposal) -> Tensor:
        return judge(proposal._replace(rows=alive[proposal.rows]))

    attack.run(
        job.defense,
        images[alive],
        labels[alive],
        ids=[ids[i] for i in alive.tolist()],
        seed=derive_seed(job.seed, f"attack {column}"),
        judge=hear,
    )
    verdict = judge.verdict
    columns: dict[str, Sequence[object]] = {
        f"{column}: stands": verdict.stands.int().tolist(),
        f"{column}: broken at": verdict.broken_at.tolist(),
        f"{column}: votes": verdict.votes.tolist(),
        f"{column}: size": attack.threat.size(verdict.images, images).tolist(),
    }
    return columns, verdict.images
