"""Saved adversarial images judged again: by fresh draws, or by another defense."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ebm_defense.attacks.base import trying
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.judge import Judgement, Stream, judge_once, refuse_few
from ebm_defense.eval.judging.rules import AsDeployed, OneStage, Rule, predicted_draws
from ebm_defense.eval.reporting.captions import attack_title
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.reporting.verification import Verification
from ebm_defense.eval.running.memory import chains_restored
from ebm_defense.eval.running.runner import SHARD
from ebm_defense.eval.storage.behaviour import another_part
from ebm_defense.eval.storage.columns import (
    CLEAN,
    IMAGE,
    LABEL,
    WORST_OF_ALL,
    Kept,
    attack_column,
    column,
)
from ebm_defense.eval.storage.settings import judge_settings
from ebm_defense.interface.modes import evaluating
from ebm_defense.interface.numbers import whole
from ebm_defense.noise import derive_seed
from ebm_defense.storage.fingerprint import fingerprint


def reverify(
    report: Report,
    model: Callable[[Tensor], Tensor],
    *,
    seed: int | None = None,
    replicates: int | None = None,
    number: int = 1,
) -> Verification:
    """Judge a run's originals and adversarial images again, each once, on fresh draws.

    A run's as-deployed verdicts by the same rule, all others by one stage. Nothing is chosen by
    its own luck: images that stood may fall, and broken ones may rise.

    Args:
        report: a run, from `evaluate` or `load_run`.
        model: the run's own defense, or another one (then it is a transfer of saved images).
        seed: of the draws; derived from the run's and `number` if not given, so never the run's.
        replicates: draws an image; if not given the run's own number, or as many as one
            prediction averages, if that is more.
        number: which verification this is.

    Raises:
        UsageError: images that the model cannot take, or replicates below 1 or below what one
            prediction averages.
    """
    if replicates is not None and whole(replicates, "replicates") < 1:
        raise UsageError(f"replicates must be at least 1, not {replicates}.")
    own = derive_seed(report.settings["seed"], f"verification {number}")
    seed = own if seed is None else whole(seed, "the seed")
    defense, rule = as_defense(model), _rule(report)
    with evaluating(defense, trying=trying([defense], report.originals)):
        labels = _labels(report, defense)
        # Another defense may average more replicates than the run's judge drew.
        enough = max(report.protocol.judge_replicates, predicted_draws(defense))
        draws = enough if replicates is None else whole(replicates, "replicates")
        refuse_few(defense, rule, draws)
        who = _who(report, defense, labels.device)
        records, judge = _verified(report, defense, labels, draws, seed, rule)
    settings = {"seed": seed, "replicates": draws, "rule": rule.name, "judge": who, **judge}
    return Verification(settings=settings, records=records, attacks=_titles(report))


def _who(report: Report, defense: PurifiedClassifier, device: torch.device) -> str:
    """Return who judges: the run's own defense by its weights and its answers, or another one."""
    if fingerprint(defense) != report.settings["defense"]["weights"]:
        return "another defense"
    if report.behaviour is None:
        return "the same weights"
    kept = report.behaviour._replace(images=report.behaviour.images.to(device))
    part = another_part(kept, defense)
    return f"the same weights, whose {part} answers differently" if part else "the same weights"


def _rule(report: Report) -> Rule:
    """Return the rule of a second judgement: the run's where it counts predictions."""
    own = report.protocol.verdict
    return own if isinstance(own, AsDeployed) else OneStage()


def _labels(report: Report, defense: PurifiedClassifier) -> Tensor:
    """Return a run's true classes where the defense is, which its images are shown to fit."""
    device = next(defense.parameters(), torch.empty(0)).device
    labels = torch.tensor(report.records[LABEL].to_numpy(copy=True), device=device)
    check_model(defense, report.originals.to(device), labels)
    return labels


def _verified(
    report: Report,
    defense: PurifiedClassifier,
    labels: Tensor,
    draws: int,
    seed: int,
    rule: Rule,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the records of a second judgement, and the settings of who judged."""
    records = report.records[[IMAGE, LABEL]].copy()
    for name, images, before in judged(report):
        stream = Stream(seed, f"verification {name}", draws)
        found = _judge(defense, images.to(labels.device), labels, records[IMAGE], stream, rule)
        records[column(name, Kept.BEFORE)] = before.to_numpy()
        records[column(name, Kept.AFTER)] = torch.cat([one.stands for one in found]).tolist()
        records[column(name, Kept.VOTES)] = torch.cat([one.votes for one in found]).tolist()
    return records, judge_settings(defense, report.originals.to(labels.device))


def judged(report: Report) -> list[tuple[str, Tensor, pd.Series[Any]]]:
    """Return what a run holds to be judged: a name, images, and the verdicts on them."""
    names = [attack_column(i, attack) for i, attack in enumerate(report.protocol.attacks)]
    found = [(n, report.adversarial[n], report.records[column(n, Kept.STANDS)]) for n in names]
    if column(WORST_OF_ALL, Kept.ATTACK) in report.records:
        found.append((WORST_OF_ALL, _worst(report, names), report.outcomes(WORST_OF_ALL)))
    return [(CLEAN, report.originals, report.outcomes(CLEAN)), *found]


def _worst(report: Report, names: list[str]) -> Tensor:
    """Return of each image the one that was judged as the worst of all attacks'."""
    place = torch.tensor(report.records[column(WORST_OF_ALL, Kept.ATTACK)].to_numpy(copy=True))
    images = torch.stack([report.adversarial[name] for name in names])
    return images[place, torch.arange(len(place))]


def _titles(report: Report) -> dict[str, str]:
    attacks = enumerate(report.protocol.attacks)
    titles = {attack_column(i, a): attack_title(a) for i, a in attacks}
    chosen = column(WORST_OF_ALL, Kept.ATTACK) in report.records
    return {CLEAN: CLEAN} | titles | ({WORST_OF_ALL: WORST_OF_ALL} if chosen else {})


def _judge(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    ids: pd.Series[int],
    stream: Stream,
    rule: Rule,
) -> list[Judgement]:
    """Judge so many images at a time as a shard has."""
    found = []
    with chains_restored(defense):
        for rows in torch.arange(len(labels)).split(SHARD):
            chosen = ids.iloc[rows.tolist()].tolist()
            judge = partial(judge_once, defense, images[rows], labels[rows], chosen, stream, rule)
            found.append(defense.packing.fitting(judge))
    return found
