"""Saved adversarial images judged again: by fresh draws, or by another defense."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.job import WORST_OF_ALL, attack_column
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.judge import Judgement, Stream, judge_once, refuse_few
from ebm_defense.eval.judging.rules import AsDeployed, OneStage, Rule, predicted_draws
from ebm_defense.eval.judging.statistics import Share, mean_share, paired_p_value
from ebm_defense.eval.memory import chains_restored
from ebm_defense.eval.reporting.report import Report, attack_title
from ebm_defense.eval.runner import SHARD
from ebm_defense.eval.storage.settings import judge_settings
from ebm_defense.files import write_text
from ebm_defense.modes import evaluating
from ebm_defense.noise import derive_seed
from ebm_defense.numbers import whole

NAME = re.compile(r"verification-(\d+)\.toml")


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a second judgement of a run's saved images found.

    Attributes:
        settings: seed, replicates and the judging defense, as plain values.
        records: a row an image: for the originals ("none") and each attack, the verdict before
            and now, in [0, 1], and the share of the fresh draws that were right.
        attacks: what was judged: the name in the records, and the title for tables.
    """

    settings: dict[str, Any]
    records: pd.DataFrame
    attacks: dict[str, str]

    def table(self) -> pd.DataFrame:
        """Return accuracy before and after, changes both ways and the paired test, by attack."""
        return pd.DataFrame([self._row(name, title) for name, title in self.attacks.items()])

    def _row(self, name: str, title: str) -> dict[str, Any]:
        before, after = (self.records[f"{name}: {when}"] for when in ("before", "after"))
        found = [mean_share(x) for x in (before, after)]
        return {
            "attack": title,
            **_numbers("before", found[0]),
            **_numbers("after", found[1]),
            "newly broken": float((before - after).clip(0).sum()),
            "newly right": float((after - before).clip(0).sum()),
            "p": paired_p_value(before, after),
            "images": len(before),
        }

    def to_text(self) -> str:
        """Return the table and what it rests on for a terminal."""
        table = self.table()
        for when in ("before", "after"):
            low, high = table.pop(f"{when} low"), table.pop(f"{when} high")
            accuracy = zip(table[when], low, high, strict=True)
            table[when] = [
                f"{100 * v:.1f} ({100 * a:.1f} to {100 * b:.1f})" for v, a, b in accuracy
            ]
        table["p"] = [f"{p:.3g}" for p in table["p"]]
        s = self.settings
        return (
            f"{table.to_string(index=False)}\n\nBefore: the run's verdict on each image. After: "
            f"{s['replicates']} fresh draws on the saved image ({s['rule']} rule), "
            f"seed {s['seed']}, by {s['judge']}. Accuracies in % with 95% Wilson intervals; p is "
            "of the paired test on the same images, McNemar's or by sign flips.\n"
        )

    def save(self, folder: str | Path) -> Path:
        """Write verification-<n>.toml, .csv (the table) and -records.csv; return the first."""
        stem = f"verification-{next_number(Path(folder))}"
        write_text(Path(folder) / f"{stem}-records.csv", self.records.to_csv(index=False))
        write_text(Path(folder) / f"{stem}.csv", self.table().to_csv(index=False))
        file = Path(folder) / f"{stem}.toml"
        write_text(file, tomli_w.dumps(self.settings))
        return file


def _numbers(when: str, found: Share) -> dict[str, float]:
    return {when: found.value, f"{when} low": found.low, f"{when} high": found.high}


def next_number(folder: Path) -> int:
    """Return the number of a run folder's next verification, from 1."""
    names = [NAME.fullmatch(p.name) for p in folder.glob("verification-*.toml")]
    return 1 + max((int(found[1]) for found in names if found), default=0)


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
    with evaluating(defense):
        labels = _labels(report, defense)
        # Another defense may average more replicates than the run's judge drew.
        enough = max(report.protocol.judge_replicates, predicted_draws(defense))
        draws = enough if replicates is None else whole(replicates, "replicates")
        refuse_few(defense, rule, draws)
        records, judge = _verified(report, defense, labels, draws, seed, rule)
    same = judge["weights"] == report.settings["defense"]["weights"]
    settings = {
        "seed": seed,
        "replicates": draws,
        "rule": rule.name,
        "judge": "the same weights" if same else "another defense",
        **judge,
    }
    return Verification(settings=settings, records=records, attacks=_titles(report))


def _rule(report: Report) -> Rule:
    """Return the rule of a second judgement: the run's where it counts predictions."""
    own = report.protocol.verdict
    return own if isinstance(own, AsDeployed) else OneStage()


def _labels(report: Report, defense: PurifiedClassifier) -> Tensor:
    """Return a run's true classes where the defense is, which its images are shown to fit."""
    device = next(defense.parameters(), torch.empty(0)).device
    labels = torch.tensor(report.records["label"].to_numpy(copy=True), device=device)
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
    records = report.records[["image", "label"]].copy()
    for name, images, before in judged(report):
        stream = Stream(seed, f"verification {name}", draws)
        found = _judge(defense, images.to(labels.device), labels, records["image"], stream, rule)
        records[f"{name}: before"] = before.to_numpy()
        records[f"{name}: after"] = torch.cat([one.stands for one in found]).tolist()
        records[f"{name}: votes"] = torch.cat([one.votes for one in found]).tolist()
    return records, judge_settings(defense, report.originals.to(labels.device))


def judged(report: Report) -> list[tuple[str, Tensor, pd.Series[Any]]]:
    """Return what a run holds to be judged: a name, images, and the verdicts on them."""
    columns = [attack_column(i, attack) for i, attack in enumerate(report.protocol.attacks)]
    found = [(c, report.adversarial[c], report.records[f"{c}: stands"]) for c in columns]
    if f"{WORST_OF_ALL}: attack" in report.records:
        found.append((WORST_OF_ALL, _worst(report, columns), report.outcomes(WORST_OF_ALL)))
    return [("none", report.originals, report.outcomes("clean")), *found]


def _worst(report: Report, columns: list[str]) -> Tensor:
    """Return of each image the one that was judged as the worst of all attacks'."""
    place = torch.tensor(report.records[f"{WORST_OF_ALL}: attack"].to_numpy(copy=True))
    images = torch.stack([report.adversarial[column] for column in columns])
    return images[place, torch.arange(len(place))]


def _titles(report: Report) -> dict[str, str]:
    attacks = enumerate(report.protocol.attacks)
    titles = {attack_column(i, a): attack_title(a) for i, a in attacks}
    worst = {WORST_OF_ALL: WORST_OF_ALL} if f"{WORST_OF_ALL}: attack" in report.records else {}
    return {"none": "none"} | titles | worst


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
