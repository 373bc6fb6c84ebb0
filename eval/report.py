"""What a run found: tables for people and for papers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.definitions import definition_table
from ebm_defense.eval.flags import Evidence, Flag, raise_flags
from ebm_defense.eval.folder import Done
from ebm_defense.eval.measures import Measures
from ebm_defense.eval.protocol import Protocol
from ebm_defense.eval.runner import attack_column
from ebm_defense.eval.statistics import CONFIDENCE, Share, share
from ebm_defense.eval.wording import describe_attack, describe_defense, describe_verdict
from ebm_defense.files import writable_folder, write_text

WORST_OF_ALL = "worst of all"
DEFINED_ON = (
    "On fresh draws of the final images, independent of the attack's and the judge's; beside each "
    "attack the clean baseline of the same definition."
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of `evaluate`.

    Attributes:
        settings: all that the records depend on, as plain values.
        protocol: what was run.
        records: one row an image.
        adversarial: by attack, the images that broke the defense or were proposed last.
        flags: signs that a number should not be believed.
        originals: the images as they were, in the order of the records.
        chain_steps, seconds: cost by phase, of all processes together.
        name: stands for the defense in comparisons.
    """

    settings: dict[str, Any]
    protocol: Protocol
    records: pd.DataFrame
    adversarial: dict[str, Tensor]
    originals: Tensor
    flags: tuple[Flag, ...] = ()
    chain_steps: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    name: str = "defended"

    def share(self, column: str) -> Share:
        """Return the share of images with 1 in a column of the records, with its interval.

        Images that the judge's rule left undecided count both ways: the interval runs from where
        all of them are broken to where all of them stand.
        """
        right, total = self.records[column], len(self.records)
        doubt = self.records.get(f"{column.removesuffix(': stands')}: undecided", 0 * right)
        found = share(int(right.sum()), total)
        low = share(int((right * (1 - doubt)).sum()), total).low
        high = share(int(right.where(doubt == 0, 1).sum()), total).high
        return found._replace(low=low, high=high)

    def robust(self, attack: int = -1) -> Share:
        """Return robust accuracy under the protocol's attack of this number."""
        number = range(len(self.protocol.attacks))[attack]
        return self.share(f"{attack_column(number, self.protocol.attacks[number])}: stands")

    def table(self) -> pd.DataFrame:
        """Return accuracies with their 95% intervals, a row for each model and attack."""
        return pd.DataFrame([_row(*line, self.share(line[-1])) for line in self._lines()])

    def definitions(self) -> pd.DataFrame:
        """Return accuracy by every definition in use, each beside its clean baseline.

        From fresh draws of the final images, on streams that neither attack nor judge has seen.
        """
        named = enumerate(self.protocol.attacks)
        final = {attack_column(i, a): self._final_title(a) for i, a in named}
        return definition_table(self.records, {"clean": "none"} | final)

    def curve(self, attack: int = -1) -> pd.Series:
        """Return robust accuracy after each attack step, the start being step 0."""
        number = range(len(self.protocol.attacks))[attack]
        one = self.protocol.attacks[number]
        broken = self.records[f"{attack_column(number, one)}: broken at"]
        left = [1.0 - float(((broken >= 0) & (broken <= s)).mean()) for s in range(one.looks)]
        return pd.Series(left, name="robust accuracy")

    def _final_title(self, attack: Attack) -> str:
        return WORST_OF_ALL if self.protocol.ensemble else attack_title(attack)

    def _lines(self) -> list[tuple[str, str, str]]:
        lines = []
        if "undefended_clean" in self.records:
            attack = self.protocol.attacks[-1].direct
            lines += [
                ("undefended", "none", "undefended_clean"),
                ("undefended", attack.name, "undefended_attacked"),
            ]
        draws = self.protocol.judge_replicates
        lines += [
            ("defended", f"none (one stage of {draws} draws)", "clean"),
            ("defended", f"none ({self.protocol.verdict.name} rule)", "natural"),
        ]
        for number, attack in enumerate(self.protocol.attacks):
            column = f"{attack_column(number, attack)}: stands"
            then = "then " if self.protocol.ensemble and number else ""
            lines.append(("defended", f"{then}{attack_title(attack)}", column))
        if self.protocol.ensemble:
            lines.append(("defended", WORST_OF_ALL, lines[-1][-1]))
        return lines

    def caption(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        attacks = " ".join(describe_attack(a) for a in self.protocol.attacks)
        if self.protocol.ensemble:
            attacks += " Each attack gets the images that still stand after those before it."
        if self.protocol.looks == "last":
            attacks += " Only the images that an attack ends with are judged."
        defense = describe_defense(self.settings["defense"])
        shard = f"Shard {self.settings['shard']} alone. " if "shard" in self.settings else ""
        return (
            f"{shard}Protocol {self.protocol.name}: {attacks} "
            f"{describe_verdict(self.protocol.verdict, self.protocol.judge_replicates)} "
            f"{self._budget()}{defense}. {len(self.records)} images, "
            f"{CONFIDENCE:.0%} Wilson intervals, seed {self.settings['seed']}.{self._footnotes()}"
        )

    def _budget(self) -> str:
        each = self.settings.get("budget", {}).get("chain_steps_an_image", 0)
        return f"{each:,} chain-steps an image that stands to the end. " if each else ""

    def _footnotes(self) -> str:
        notes = (
            f" [{i}] {flag.name}: {flag.evidence}. {flag.advice}"
            for i, flag in enumerate(self.flags, 1)
        )
        return "".join(notes)

    def _marks(self, attack: int | None) -> str:
        """Return the marks of the flags that concern an attack, or (None) the model."""
        numbered = enumerate(self.flags, 1)
        concerned = [
            str(i) for i, f in numbered if (attack in f.attacks if f.attacks else attack is None)
        ]
        return f" [{', '.join(concerned)}]" if concerned else ""

    def _marked(self) -> tuple[list[str], list[str]]:
        """Return the table's models and attacks with the marks of their flags."""
        lines = self._lines()
        before = [column for _, _, column in lines].index(
            f"{attack_column(0, self.protocol.attacks[0])}: stands"
        )
        models = [m + self._marks(None) * (m == "defended") for m, _, _ in lines]
        attacks = [
            a + (self._marks(i - before) if i >= before else "")
            for i, (_, a, _) in enumerate(lines)
        ]
        return models, attacks

    def to_text(self) -> str:
        """Return the table and its caption for a terminal."""
        tables = (self.printable(), self._printable_definitions())
        shown = "\n\n".join(t.to_string(index=False) for t in tables)
        return f"{shown}\n\n{self.caption()}\n"

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        tables = (self.printable(), self._printable_definitions())
        shown = "\n\n".join(t.to_markdown(index=False, disable_numparse=True) for t in tables)
        return f"{shown}\n\n{self.caption()}\n"

    def to_latex(self) -> str:
        """Return the tables as LaTeX with booktabs, their captions included."""
        captions = (self.caption(), f"The same images by other definitions. {DEFINED_ON}")
        tables = (self.printable(), self._printable_definitions())
        return "\n".join(_latex(t, c) for t, c in zip(tables, captions, strict=True))

    def to_csv(self) -> str:
        """Return the table as CSV, with unrounded numbers."""
        return self.table().to_csv(index=False)

    def save(self, folder: str | Path) -> Path:
        """Write table.txt, .md, .tex and .csv, definitions.csv and flags.toml into a folder."""
        path = writable_folder(folder)
        write_text(path / "table.txt", self.to_text())
        write_text(path / "table.md", self.to_markdown())
        write_text(path / "table.tex", self.to_latex())
        write_text(path / "table.csv", self.to_csv())
        write_text(path / "definitions.csv", self.definitions().to_csv(index=False))
        raised = [dataclasses.asdict(flag) for flag in self.flags]
        write_text(path / "flags.toml", tomli_w.dumps({"flag": raised}))
        return path

    def _printable_definitions(self) -> pd.DataFrame:
        found = self.definitions()
        cells = found.assign(
            cell=[
                f"{100 * value:.1f} ({ends})"
                for value, ends in zip(found["accuracy"], _intervals(found), strict=True)
            ],
        )
        wide = cells.pivot_table(
            index="definition", columns="images of", values="cell", aggfunc="first", sort=False
        )
        return wide.rename_axis(columns=None).reset_index()

    def printable(self) -> pd.DataFrame:
        """Return the table as it is printed, rounded."""
        table, (models, attacks) = self.table(), self._marked()
        return pd.DataFrame(
            {
                "model": models,
                "attack": attacks,
                "accuracy %": [f"{100 * v:.1f}" for v in table["accuracy"]],
                "95% interval": _intervals(table),
                "images": table["images"],
            }
        )


def report_of(
    done: Done,
    settings: dict[str, Any],
    protocol: Protocol,
    images: Tensor,
    measures: Measures | None,
    name: str = "defended",
) -> Report:
    """Return the report of finished shards, on some or all of the run's `images`.

    Without `measures` of the model no flag is raised.
    """
    records, adversarial = done.shard
    flags: tuple[Flag, ...] = ()
    if measures is not None:
        flags = raise_flags(Evidence(protocol=protocol, records=records, measures=measures))
    return Report(
        settings=settings,
        protocol=protocol,
        records=records,
        adversarial=adversarial,
        flags=flags,
        originals=images[torch.tensor(records["image"].to_numpy(copy=True))].cpu(),
        chain_steps=done.costs["steps"],
        seconds=done.costs["seconds"],
        name=name,
    )


def _intervals(table: pd.DataFrame) -> list[str]:
    ends = zip(table["low"], table["high"], strict=True)
    return [f"{100 * low:.1f} to {100 * high:.1f}" for low, high in ends]


def _latex(table: pd.DataFrame, caption: str) -> str:
    named = table.rename(columns=_escape)
    style = named.style.hide(axis="index").format(escape="latex")
    latex: str = style.to_latex(hrules=True, caption=_escape(caption), position_float="centering")
    return latex


def _escape(text: str) -> str:
    return text.replace("%", r"\%").replace("_", r"\_")


def attack_title(attack: Attack) -> str:
    """Return an attack's name with how it differentiates the defense."""
    gradient = getattr(attack, "gradient", None)
    return f"{attack.name} ({gradient.name}+EOT)" if gradient else attack.name


def _row(model: str, attack: str, column: str, found: Share) -> dict[str, Any]:
    return {
        "model": model,
        "attack": attack,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "correct": found.right,
        "images": found.total,
    }
