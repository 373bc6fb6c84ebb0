"""What a run found: tables for people and for papers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.judging.definitions import definition_table
from ebm_defense.eval.judging.sanity_checks import SanityChecks
from ebm_defense.eval.judging.statistics import CONFIDENCE, Share, share
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.reporting import latex
from ebm_defense.eval.reporting.captions import attack_caption, defense_caption, verdict_caption
from ebm_defense.eval.reporting.flags import Evidence, Flag, raise_flags
from ebm_defense.eval.runner import attack_column
from ebm_defense.eval.storage.run_folder import Done
from ebm_defense.files import writable_folder, write_text
from ebm_defense.purifiers.registry import kind_of

WORST_OF_ALL = "worst of all"
DEFINED_ON = (
    "On fresh draws of the final images, independent of the attack's and the judge's; beside each "
    "attack the clean baseline of the same definition."
)


def inline(number: str, interval: str) -> str:
    """Return a number and its interval on one line."""
    return f"{number} ({interval})"


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
        low, found, high = (
            share(int(self.outcomes(column, doubt).sum()), len(self.records))
            for doubt in (0, None, 1)
        )
        return found._replace(low=low.low, high=high.high)

    def outcomes(self, column: str, doubt: int | None = None) -> pd.Series[Any]:
        """Return 1 or 0 an image; `doubt` on those left undecided, if it is given.

        The column `WORST_OF_ALL` is 1 where an image stands under every attack of the protocol.
        """
        if column == WORST_OF_ALL:
            named = itertools.starmap(stands_column, enumerate(self.protocol.attacks))
            each = [self.outcomes(stands, doubt) for stands in named]
            return pd.concat(each, axis=1).min(axis=1)
        right = self.records[column]
        undecided = self.records.get(f"{column.removesuffix(': stands')}: undecided", 0 * right)
        return right if doubt is None else right.where(undecided == 0, doubt)

    def robust(self, attack: int | None = None) -> Share:
        """Return robust accuracy, image by image under all attacks or under that of a number."""
        if attack is None:
            return self.share(WORST_OF_ALL)
        number = range(len(self.protocol.attacks))[attack]
        return self.share(stands_column(number, self.protocol.attacks[number]))

    def cost(self) -> float:
        """Return the chain-steps that an image of the run cost, all phases together."""
        return sum(self.chain_steps.values()) / max(len(self.records), 1)

    def prediction_cost(self) -> float:
        """Return the chain-steps of one prediction as it was judged: K times draws, or 0."""
        purifier = self.settings["defense"]["purifier"]
        draws = self.protocol.judge_replicates if purifier.get("stochastic", True) else 1
        return float(purifier.get("steps", 0) * draws)

    def table(self) -> pd.DataFrame:
        """Return accuracies with their 95% intervals, a row for each model and attack."""
        return pd.DataFrame([_row(*line, self.share(line[-1])) for line in self._lines()])

    def definitions(self) -> pd.DataFrame:
        """Return accuracy by every definition in use, each beside its clean baseline.

        From fresh draws of the final images, on streams that neither attack nor judge has seen.
        """
        named = enumerate(self.protocol.attacks)
        final = {attack_column(i, a): self.final_title(i) for i, a in named}
        return definition_table(self.records, {"clean": "none"} | final)

    def curve(self, attack: int = -1) -> pd.Series:
        """Return robust accuracy after each attack step, the start being step 0."""
        number = range(len(self.protocol.attacks))[attack]
        one = self.protocol.attacks[number]
        broken = self.records[f"{attack_column(number, one)}: broken at"]
        left = [1.0 - float(((broken >= 0) & (broken <= s)).mean()) for s in range(one.looks)]
        return pd.Series(left, name="robust accuracy")

    def final_title(self, attack: int = -1) -> str:
        """Return what the images that an attack of this number ends with are called."""
        return (
            WORST_OF_ALL if self.protocol.ensemble else attack_title(self.protocol.attacks[attack])
        )

    def _lines(self) -> list[tuple[str, str, str]]:
        lines = []
        if "undefended_clean" in self.records:
            attack = self.protocol.attacks[-1].direct
            lines += [
                ("undefended", "none", "undefended_clean"),
                ("undefended", attack.name, "undefended_attacked"),
            ]
        draws, model = self.protocol.judge_replicates, self._model()
        lines += [
            (model, f"none (one stage of {draws} draws)", "clean"),
            (model, f"none ({self.protocol.verdict.name} rule)", "natural"),
        ]
        for number, attack in enumerate(self.protocol.attacks):
            column = stands_column(number, attack)
            then = "then " if self.protocol.ensemble and number else ""
            lines.append((model, f"{then}{attack_title(attack)}", column))
        if len(self.protocol.attacks) > 1:
            lines.append((model, WORST_OF_ALL, WORST_OF_ALL))
        return lines

    def _model(self) -> str:
        kind = kind_of(self.settings["defense"]["purifier"])
        bare = kind is not None and kind.identity
        return "undefended" if bare else "defended"

    def caption(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        attacks = " ".join(attack_caption(a) for a in self.protocol.attacks)
        if self.protocol.ensemble:
            attacks += " Each attack gets the images that still stand after those before it."
        if self.protocol.looks == "last":
            attacks += " Only the images that an attack ends with are judged."
        defense = defense_caption(self.settings["defense"])
        shard = f"Shard {self.settings['shard']} alone. " if "shard" in self.settings else ""
        return (
            f"{shard}Protocol {self.protocol.name}: {attacks} "
            f"{verdict_caption(self.protocol.verdict, self.protocol.judge_replicates)} "
            f"{self._budget()}{defense}. {len(self.records)} images, "
            f"{CONFIDENCE:.0%} Wilson intervals, seed {self.settings['seed']}.{self._footnotes()}"
        )

    def _budget(self) -> str:
        each = self.settings.get("budget", {}).get("chain_steps_an_image", 0)
        least = "At least " if any(attack.open_ended for attack in self.protocol.attacks) else ""
        return f"{least}{each:,} chain-steps an image that stands to the end. " if each else ""

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
        columns = [column for _, _, column in lines]
        before = columns.index(stands_column(0, self.protocol.attacks[0]))
        own = columns.index("clean")  # the rows before are of the bare classifier beside it
        models = [m + self._marks(None) * (i >= own) for i, (m, _, _) in enumerate(lines)]
        attacks = [
            a + (self._marks(i - before) if i >= before else "")
            for i, (_, a, _) in enumerate(lines)
        ]
        return models, attacks

    def to_text(self) -> str:
        """Return the table and its caption for a terminal."""
        tables = (self.printable(), self.printable_definitions())
        shown = "\n\n".join(t.to_string(index=False) for t in tables)
        return f"{shown}\n\n{self.caption()}\n"

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        tables = (self.printable(), self.printable_definitions())
        shown = "\n\n".join(t.to_markdown(index=False, disable_numparse=True) for t in tables)
        return f"{shown}\n\n{self.caption()}\n"

    def to_latex(self) -> str:
        """Return the tables as LaTeX with booktabs, their captions included."""
        accuracies, definitions = self.printable(), self.printable_definitions(latex.stacked)
        rows = accuracies.astype(str).to_numpy().tolist()
        first = latex.table(
            list(accuracies.columns),
            [[latex.words(cell) for cell in row] for row in rows],
            align="llrcr",
            caption="Accuracies before and after attack.",
            notes=self.caption(),
        )
        second = latex.table(
            list(definitions.columns),
            [[latex.words(name), *cells] for name, *cells in definitions.to_numpy().tolist()],
            align="l" + "c" * (definitions.shape[1] - 1),
            caption="The same images by other definitions: accuracy in % and its interval.",
            notes=DEFINED_ON,
        )
        return f"{first}\n{second}"

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

    def printable_definitions(self, cell: Callable[[str, str], Any] = inline) -> pd.DataFrame:
        """Return the table of definitions as it is printed: a row each, a column an attack.

        Args:
            cell: writes a number and its interval, both rounded.
        """
        found = self.definitions()
        numbers = [f"{100 * value:.1f}" for value in found["accuracy"]]
        cells = found.assign(cell=list(map(cell, numbers, _intervals(found))))
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
    sanity_checks: SanityChecks | None,
    name: str = "defended",
) -> Report:
    """Return the report of finished shards, on some or all of the run's `images`.

    Without `sanity_checks` of the model no flag is raised.
    """
    records, adversarial = done.shard
    flags: tuple[Flag, ...] = ()
    if sanity_checks is not None:
        flags = raise_flags(
            Evidence(protocol=protocol, records=records, sanity_checks=sanity_checks)
        )
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


def stands_column(number: int, attack: Attack) -> str:
    """Return the records' column of which images stand after an attack."""
    return f"{attack_column(number, attack)}: stands"


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
