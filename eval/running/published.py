"""Evaluations as published: an attack's every look, or its last images, before a judge.

An image that one look breaks is broken for good, so a random defense is tried until it fails: the
rule of Hill, Mitchell, Zhu (2021). Beside its number stand those of the same images on fresh draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack, Proposal, attack_replicates, cost, lenient
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.attacks.threat import ThreatModel
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.judging.definitions import definition_columns
from ebm_defense.eval.judging.judge import Judge, Stream, Verdict, draw_logits, uncounted
from ebm_defense.eval.judging.rules import predicted_draws
from ebm_defense.eval.running.job import Job, Meter, Part
from ebm_defense.eval.storage.columns import (
    CLEAN,
    CLEAN_VOTES,
    NATURAL,
    UNDEFENDED_ATTACKED,
    UNDEFENDED_CLEAN,
    Columns,
    Kept,
    attack_column,
    column,
    under,
)
from ebm_defense.noise import derive_seed


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that stands to the end of every attack, unverified."""
    purifier, protocol = job.defense.purifier, job.protocol
    first = attack_replicates(protocol.attacks[-1].replicates, job.defense)
    judge = attack_replicates(protocol.judge_replicates, job.defense)
    fresh = len(judge) * (1 + (1 if protocol.ensemble else len(protocol.attacks)))
    clean = (len(first) + fresh) * purifier.chain_steps
    return clean + sum(a.chain_steps(job.defense) for a in protocol.attacks)


def run_published(job: Job, part: Part, meter: Meter) -> tuple[Columns, dict[str, Tensor]]:
    """Evaluate some images, each attack on those that were right; return columns and images."""
    columns: Columns = {}
    adversarial: dict[str, Tensor] = {}
    if job.bare is not None:
        meter.enter("undefended")
        columns |= _undefended(job, job.bare, part, meter)
    meter.enter("clean")
    columns |= _clean(job, part, meter)
    natural = _natural(job, part, meter)
    columns[NATURAL] = natural.stands.int().tolist()
    columns[column(NATURAL, Kept.UNDECIDED)] = natural.undecided.int().tolist()
    before = natural
    for number, attack in enumerate(job.protocol.attacks):
        meter.enter(attack.name)
        name = attack_column(number, attack)
        verdict = _attack(job, name, attack, part, before, meter)
        size = attack.threat.size(verdict.images, part.images)
        columns |= _verdict_columns(name, verdict) | {column(name, Kept.SIZE): size.tolist()}
        if not job.protocol.ensemble or number == len(job.protocol.attacks) - 1:
            columns |= _define(job, name, part._replace(images=verdict.images), meter)
        before = verdict if job.protocol.ensemble else natural
        adversarial[name] = verdict.images
    return columns, adversarial


def _undefended(job: Job, bare: PurifiedClassifier, part: Part, meter: Meter) -> Columns:
    with torch.no_grad():
        right = bare.classify(part.images).argmax(-1) == part.labels
    attack = job.protocol.attacks[-1].direct
    judge = _judge(job, part, "undefended", attack.threat, meter, defense=bare)
    judge.strike((~right).nonzero().flatten())
    seed = derive_seed(job.seed, "undefended")
    attack.run(bare, part.images, part.labels, ids=part.ids, seed=seed, judge=judge)
    return {
        UNDEFENDED_CLEAN: right.int().tolist(),
        UNDEFENDED_ATTACKED: judge.verdict.stands.int().tolist(),
    }


def _clean(job: Job, part: Part, meter: Meter) -> Columns:
    """Clean accuracy by one stage of H draws."""
    draws = job.protocol.judge_replicates
    logits = draw_logits(job.defense, part.images, part.ids, job.stream("clean", draws, meter))
    refuse_nan(logits, part.ids)
    right = job.defense.combine(logits).argmax(-1) == part.labels
    votes = (logits.argmax(-1) == part.labels).float().mean(0)
    found: Columns = {CLEAN: right.int().tolist(), CLEAN_VOTES: votes.tolist()}
    return found | _definitions(job, CLEAN, logits, part)


def _define(job: Job, name: str, part: Part, meter: Meter) -> Columns:
    """Draw final images afresh, once for every definition of robust accuracy."""
    stream = job.stream(f"definitions {name}", job.protocol.judge_replicates, meter)
    logits = draw_logits(job.defense, part.images, part.ids, stream)
    refuse_nan(logits, part.ids)
    return _definitions(job, name, logits, part)


def _definitions(job: Job, name: str, logits: Tensor, part: Part) -> Columns:
    predicted = predicted_draws(job.defense)
    return definition_columns(name, logits, part.labels, job.defense.combine, predicted)


def _natural(job: Job, part: Part, meter: Meter) -> Verdict:
    """Clean accuracy by the protocol's rule, as attacked images are judged."""
    looks = job.stream("natural look", job.protocol.attacks[-1].replicates, meter)
    first = draw_logits(job.defense, part.images, part.ids, looks._replace(notify=uncounted))
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

    def ask(proposal: Proposal) -> Tensor:
        return judge(proposal._replace(rows=alive[proposal.rows]))

    RUNS[job.protocol.looks](job, name, attack, left, ask, meter)
    stood = before.stands.view(-1, 1, 1, 1).to(part.images.device)
    found = judge.verdict
    return replace(found, images=torch.where(stood, found.images, before.images))


def _run_every(job: Job, name: str, attack: Attack, left: Part, ask: Ask, meter: Meter) -> Tensor:
    """Run an attack whose every look comes before the judge."""
    seed = derive_seed(job.seed, f"attack {name}")
    return attack.run(job.defense, left.images, left.labels, ids=left.ids, seed=seed, judge=ask)


def _run_last(job: Job, name: str, attack: Attack, left: Part, ask: Ask, meter: Meter) -> Tensor:
    """Run an attack whose last images alone come before the judge, with a look of their own."""
    blind = torch.zeros(len(left.labels), dtype=torch.bool)

    def let_go_on(proposal: Proposal) -> Tensor:
        if proposal.blind is not None:
            blind[proposal.rows.cpu()] |= proposal.blind.cpu()
        meter.count(cost(proposal, job.defense))
        return lenient(proposal)

    x = _run_every(job, name, attack, left, let_go_on, meter)
    looks = Stream(job.seed, f"attack {name} last look", attack.replicates)
    logits = draw_logits(job.defense, x, left.ids, looks)
    ask(Proposal(attack.looks - 1, torch.arange(len(x)), x, logits, blind))
    return x


Ask = Callable[[Proposal], Tensor]
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
    return under(
        name,
        {
            Kept.STANDS: verdict.stands.int().tolist(),
            Kept.BROKEN_AT: verdict.broken_at.tolist(),
            Kept.VOTES: verdict.votes.tolist(),
            Kept.VERIFIED_ON: verdict.draws.tolist(),
            Kept.UNDECIDED: verdict.undecided.int().tolist(),
            Kept.ATTACK_RIGHT: verdict.seen[0].tolist(),
            Kept.ATTACK_DRAWS: verdict.seen[1].tolist(),
            Kept.BLIND: verdict.blind.tolist(),
        },
    )
