"""Evaluations that select, then judge: what the judge draws decides nothing of what is judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack, attack_replicates
from ebm_defense.attacks.session import refuse_nan
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.eval.judging.definitions import definition_columns
from ebm_defense.eval.judging.judge import Judgement, draw_logits, judge_once
from ebm_defense.eval.judging.rules import predicted_draws
from ebm_defense.eval.judging.selection import Chosen, Selection, Selector, worst_place
from ebm_defense.eval.running.job import Job, Meter, Part
from ebm_defense.eval.storage.columns import (
    CLEAN,
    NATURAL,
    UNDEFENDED_ATTACKED,
    UNDEFENDED_CLEAN,
    WORST_OF_ALL,
    Columns,
    Kept,
    attack_column,
    column,
    under,
)
from ebm_defense.noise import derive_seed

LAST = Selection(candidates=1, leave=0.0)
"""Selects what an attack returns in the end."""


class Found(NamedTuple):
    """What an attack, and those before it, left to be judged of a part's images.

    Attributes:
        images: `[b, C, H, W]`.
        left: which of them an attack left early, as surely broken, bool `[b]`.
    """

    images: Tensor
    left: Tensor


def planned_steps(job: Job) -> int:
    """Return the chain-steps of one image that no attack leaves early, tests not counted."""
    defense, protocol = job.defense, job.protocol
    selection, several = protocol.selection or LAST, len(protocol.attacks) > 1
    views = sum(len(attack_replicates(a.replicates, defense)) for a in protocol.attacks)
    judge = len(attack_replicates(protocol.judge_replicates, defense))
    judged = judge * (1 + len(protocol.attacks) + several)
    common = len(protocol.attacks) * selection.draws * several if defense.stochastic else 0
    return (judged + views + common) * defense.purifier.chain_steps + sum(
        attack.chain_steps(defense) + selection.chain_steps(defense, attack)
        for attack in protocol.attacks
    )


def run_selected(job: Job, part: Part, meter: Meter) -> tuple[Columns, dict[str, Tensor]]:
    """Evaluate some images, every attack on all of them; return columns and images.

    In an ensemble an attack spares the images that one before it surely broke, and keeps theirs.
    """
    columns: Columns = {}
    if job.bare is not None:
        meter.enter("undefended")
        columns |= _undefended(job, job.bare, part, meter)
    meter.enter("clean")
    columns |= _clean(job, part, meter)
    found: list[Found] = []
    nothing = Found(part.images, torch.zeros(len(part.labels), dtype=torch.bool))
    for number, attack in enumerate(job.protocol.attacks):
        meter.enter(attack.name)
        before = found[-1] if found and job.protocol.ensemble else nothing
        name, going = attack_column(number, attack), (~before.left).nonzero().flatten()
        some = Part(part.images[going], part.labels[going], [part.ids[i] for i in going.tolist()])
        selector, seed = _selector(job, job.defense, attack, some, name, meter)
        returned = attack.run(
            job.defense, some.images, some.labels, ids=some.ids, seed=seed, judge=selector
        )
        chosen = selector.choose(returned)
        one, new = _judged(job, name, attack, part, before, going, chosen, meter)
        found.append(one)
        columns |= new
    if len(found) > 1:
        meter.enter(WORST_OF_ALL)
        columns |= _worst_of_all(job, part, found, meter)
    attacks = enumerate(job.protocol.attacks)
    names = [attack_column(number, attack) for number, attack in attacks]
    return columns, {name: one.images for name, one in zip(names, found, strict=True)}


def _undefended(job: Job, bare: PurifiedClassifier, part: Part, meter: Meter) -> Columns:
    with torch.no_grad():
        right = bare.classify(part.images).argmax(-1) == part.labels
    attack = job.protocol.attacks[-1].direct
    selector, seed = _selector(job, bare, attack, part, "undefended", meter)
    returned = attack.run(bare, part.images, part.labels, ids=part.ids, seed=seed, judge=selector)
    chosen = selector.choose(returned)
    found = _judge(job, bare, part._replace(images=chosen.images), "undefended", meter)
    return {
        UNDEFENDED_CLEAN: right.int().tolist(),
        UNDEFENDED_ATTACKED: found.stands.tolist(),
    }


def _clean(job: Job, part: Part, meter: Meter) -> Columns:
    found = _judge(job, job.defense, part, "clean", meter)
    stands = found.stands.tolist()
    return {CLEAN: stands, NATURAL: stands, **_columns(job, CLEAN, part, found)}


def _judged(
    job: Job,
    name: str,
    attack: Attack,
    part: Part,
    before: Found,
    going: Tensor,
    chosen: Chosen,
    meter: Meter,
) -> tuple[Found, Columns]:
    """Judge what was chosen on the images `going`, and what was before on the others."""
    images, left = before.images.clone(), before.left.clone()
    images[going], left[going] = chosen.images, chosen.left
    attacked = part._replace(images=images)
    judged = _judge(job, job.defense, attacked, name, meter)
    columns: Columns = {
        column(name, Kept.STANDS): judged.stands.tolist(),
        **_columns(job, name, part, judged),
        **_spread(name, chosen, going, len(part.labels)),
        **_view(job, name, attack, attacked, meter),
        column(name, Kept.LEFT): left.int().tolist(),
        column(name, Kept.SIZE): attack.threat.size(images, part.images).tolist(),
    }
    return Found(images, left), columns


def _selector(
    job: Job,
    defense: PurifiedClassifier,
    attack: Attack,
    part: Part,
    name: str,
    meter: Meter,
) -> tuple[Selector, int]:
    """Return what chooses from an attack's proposals, and the attack's seed."""
    selector = Selector(
        defense,
        attack,
        part.images,
        part.labels,
        ids=part.ids,
        selection=job.protocol.selection or LAST,
        stream=job.stream(f"attack {name}", 0, meter),
    )
    return selector, derive_seed(job.seed, f"attack {name}")


def _judge(job: Job, defense: PurifiedClassifier, part: Part, name: str, meter: Meter) -> Judgement:
    stream = job.stream(f"judge {name}", job.protocol.judge_replicates, meter)
    return judge_once(defense, part.images, part.labels, part.ids, stream, job.protocol.verdict)


def _columns(job: Job, name: str, part: Part, found: Judgement) -> Columns:
    """Return what records keep of one judgement."""
    predicted = predicted_draws(job.defense)
    defined = definition_columns(name, found.logits, part.labels, job.defense.combine, predicted)
    judged: Columns = under(
        name,
        {
            Kept.VOTES: found.votes.tolist(),
            Kept.VERIFIED_ON: found.draws.tolist(),
            Kept.UNDECIDED: found.undecided.int().tolist(),
        },
    )
    return judged | defined


def _spread(name: str, chosen: Chosen, going: Tensor, count: int) -> Columns:
    """Return what records keep of an attack; of images that it spared, nothing was seen."""
    steps, blind = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
    steps[going], blind[going] = chosen.steps, chosen.blind
    course = [""] * count
    for i, seen in zip(going.tolist(), chosen.course, strict=True):
        course[i] = seen
    return under(
        name,
        {
            Kept.CHOSEN_AT: steps.tolist(),
            Kept.BLIND: blind.tolist(),
            Kept.COURSE: course,
        },
    )


def _view(job: Job, name: str, attack: Attack, part: Part, meter: Meter) -> Columns:
    """Look at the chosen images as the attack does; a flag compares that with the judge's view."""
    stream = job.stream(f"view {name}", attack.replicates, meter)
    logits = draw_logits(job.defense, part.images, part.ids, stream)
    refuse_nan(logits, part.ids)
    right = (logits.argmax(-1) == part.labels).sum(0)
    return under(
        name,
        {
            Kept.ATTACK_RIGHT: right.tolist(),
            Kept.ATTACK_DRAWS: [len(logits)] * len(part.labels),
        },
    )


def _worst_of_all(job: Job, part: Part, found: list[Found], meter: Meter) -> Columns:
    """Choose the worst of the attacks' images, by draws common to all of them, and judge it."""
    images, left = (torch.stack(values) for values in zip(*found, strict=True))
    draws = (job.protocol.selection or Selection()).draws
    stream = job.stream("select worst of all", draws, meter)
    place = worst_place(job.defense, images, part.labels, part.ids, stream, left)
    chosen = part._replace(images=images[place, torch.arange(len(place))])
    judged = _judge(job, job.defense, chosen, WORST_OF_ALL, meter)
    return {
        column(WORST_OF_ALL, Kept.STANDS): judged.stands.tolist(),
        column(WORST_OF_ALL, Kept.ATTACK): place.tolist(),
        **_columns(job, WORST_OF_ALL, part, judged),
    }
