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

from ebm_defense.attacks.session import refuse_nan
from ebm_defense.defense import PurifiedClassifier, as_defense
from ebm_defense.errors import UsageError
from ebm_defense.eval.judging.check_model import check_model
from ebm_defense.eval.judging.judge import Stream, draw_logits
from ebm_defense.eval.judging.paired import mcnemar
from ebm_defense.eval.judging.statistics import Share, share
from ebm_defense.eval.memory import chains_restored
from ebm_defense.eval.reporting.report import Report, attack_title
from ebm_defense.eval.runner import SHARD, attack_column
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
        records: a row an image: for the originals ("none") and each attack, whether the image was
            right before and is now, and the share of the fresh draws that were.
        attacks: what was judged: the name in the records, and the title for tables.
    """

    settings: dict[str, Any]
    records: pd.DataFrame
    attacks: dict[str, str]

    def table(self) -> pd.DataFrame:
        """Return accuracy before and after, changes both ways and the paired test, by attack."""
        return pd.DataFrame([self._row(name, title) for name, title in self.attacks.items()])

    def _row(self, name: str, title: str) -> dict[str, Any]:
        before = self.records[f"{name}: before"].astype(bool)
        after = self.records[f"{name}: after"].astype(bool)
        found = [share(int(x.sum()), len(x)) for x in (before, after)]
        return {
            "attack": title,
            **_numbers("before", found[0]),
            **_numbers("after", found[1]),
            "newly broken": int((before & ~after).sum()),
            "newly right": int((~before & after).sum()),
            "p": mcnemar(before, after),
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
            f"{table.to_string(index=False)}\n\nBefore: the run's verdict on each image, during "
            f"the attack. After: one stage of {s['replicates']} fresh draws on the saved image, "
            f"seed {s['seed']}, by {s['judge']}. Accuracies in % with 95% Wilson intervals; p is "
            "McNemar's, exact, on the same images.\n"
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
    """Judge a run's originals and adversarial images again, by one stage of fresh draws.

    One stage looks at every image once, so that nothing is chosen by its own luck: images that
    stood may fall, and broken ones may rise.

    Args:
        report: a run, from `evaluate` or `load_run`.
        model: the run's own defense, or another one (then it is a transfer of saved images).
        seed: of the draws; derived from the run's and `number` if not given, so never the run's.
        replicates: draws an image; the run's own number if not given.
        number: which verification this is.

    Raises:
        UsageError: images that the model cannot take, or replicates below 1.
    """
    draws = whole(report.protocol.judge_replicates if replicates is None else replicates, "draws")
    if draws < 1:
        raise UsageError(f"replicates must be at least 1, not {draws}.")
    own = derive_seed(report.settings["seed"], f"verification {number}")
    seed = own if seed is None else whole(seed, "the seed")
    defense = as_defense(model)
    with evaluating(defense):
        records, judge = _verified(report, defense, draws, seed)
    same = judge["weights"] == report.settings["defense"]["weights"]
    settings = {
        "seed": seed,
        "replicates": draws,
        "judge": "the same weights" if same else "another defense",
        **judge,
    }
    return Verification(settings=settings, records=records, attacks=_titles(report))


def _verified(
    report: Report, defense: PurifiedClassifier, draws: int, seed: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the records of a second judgement, and the settings of who judged."""
    device = next(defense.parameters(), torch.empty(0)).device
    originals = report.originals.to(device)
    labels = torch.tensor(report.records["label"].to_numpy(copy=True), device=device)
    check_model(defense, originals, labels)
    records = report.records[["image", "label"]].copy()
    for name, images, before in judged(report):
        stream = Stream(seed, f"verification {name}", draws)
        right, votes = _judge(defense, images.to(device), labels, records["image"], stream)
        records[f"{name}: before"] = before.astype(int).to_numpy()
        records[f"{name}: after"] = right.int().tolist()
        records[f"{name}: votes"] = votes.tolist()
    return records, judge_settings(defense, originals)


def judged(report: Report) -> list[tuple[str, Tensor, pd.Series[Any]]]:
    """Return what a run holds to be judged: a name, images, and the verdicts on them."""
    columns = [attack_column(i, attack) for i, attack in enumerate(report.protocol.attacks)]
    found = [(c, report.adversarial[c], report.records[f"{c}: stands"]) for c in columns]
    return [("none", report.originals, report.records["clean"]), *found]


def _titles(report: Report) -> dict[str, str]:
    attacks = enumerate(report.protocol.attacks)
    return {"none": "none"} | {attack_column(i, a): attack_title(a) for i, a in attacks}


def _judge(
    defense: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    ids: pd.Series[int],
    stream: Stream,
) -> tuple[Tensor, Tensor]:
    """Return which images are right by their mean, and the shares of draws that were."""
    right, votes = [], []
    with chains_restored(defense):
        for rows in torch.arange(len(labels)).split(SHARD):
            chosen = ids.iloc[rows.tolist()].tolist()
            draw = partial(draw_logits, defense, images[rows], chosen, stream)
            logits = defense.packing.fitting(draw)
            refuse_nan(logits, chosen)
            right.append((defense.combine(logits).argmax(-1) == labels[rows]).cpu())
            votes.append((logits.argmax(-1) == labels[rows]).float().mean(0).cpu())
    return torch.cat(right), torch.cat(votes)
