"""What a run found: tables for people and for papers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.folder import Done
from ebm_defense.eval.protocol import Protocol
from ebm_defense.eval.runner import attack_column
from ebm_defense.eval.statistics import CONFIDENCE, Share, share
from ebm_defense.eval.wording import describe_attack, describe_purifier
from ebm_defense.files import writable_folder, write_text


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of `evaluate`.

    Attributes:
        settings: all that the records depend on, as plain values.
        protocol: what was run.
        records: one row an image.
        adversarial: by attack, the images that broke the defense or were proposed last.
        originals: the images as they were, in the order of the records.
        chain_steps, seconds: cost by phase, of all processes together.
        name: stands for the defense in comparisons.
    """

    settings: dict[str, Any]
    protocol: Protocol
    records: pd.DataFrame
    adversarial: dict[str, Tensor]
    originals: Tensor
    chain_steps: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    name: str = "defended"

    def share(self, column: str) -> Share:
        """Return the share of images with 1 in a column of the records, with its interval."""
        return share(int(self.records[column].sum()), len(self.records))

    def robust(self, attack: int = -1) -> Share:
        """Return robust accuracy under the protocol's attack of this number."""
        number = range(len(self.protocol.attacks))[attack]
        return self.share(f"{attack_column(number, self.protocol.attacks[number])}: stands")

    def table(self) -> pd.DataFrame:
        """Return accuracies with their 95% intervals, a row for each model and attack."""
        return pd.DataFrame([_row(*line, self.share(line[-1])) for line in self._lines()])

    def curve(self, attack: int = -1) -> pd.Series:
        """Return robust accuracy after each attack step, the start being step 0."""
        number = range(len(self.protocol.attacks))[attack]
        one = self.protocol.attacks[number]
        broken = self.records[f"{attack_column(number, one)}: broken at"]
        left = [1.0 - float(((broken >= 0) & (broken <= s)).mean()) for s in range(one.looks)]
        return pd.Series(left, name="robust accuracy")

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
            ("defended", "none (two-stage rule)", "natural"),
        ]
        for number, attack in enumerate(self.protocol.attacks):
            column = f"{attack_column(number, attack)}: stands"
            lines.append(("defended", attack_title(attack), column))
        return lines

    def caption(self) -> str:
        """Return everything the numbers depend on, in sentences."""
        attacks = " ".join(describe_attack(a) for a in self.protocol.attacks)
        purifier = describe_purifier(self.settings["defense"]["purifier"])
        shard = f"Shard {self.settings['shard']} alone. " if "shard" in self.settings else ""
        return (
            f"{shard}Protocol {self.protocol.name}: {attacks} "
            f"Judged on {self.protocol.judge_replicates} fresh replicates. "
            f"Purifier: {purifier}. {len(self.records)} images, "
            f"{CONFIDENCE:.0%} Wilson intervals, seed {self.settings['seed']}."
        )

    def to_text(self) -> str:
        """Return the table and its caption for a terminal."""
        return f"{self.printable().to_string(index=False)}\n\n{self.caption()}\n"

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        table = self.printable().to_markdown(index=False, disable_numparse=True)
        return f"{table}\n\n{self.caption()}\n"

    def to_latex(self) -> str:
        """Return the table as LaTeX with booktabs, its caption included."""
        style = self.printable(r"\%").style.hide(axis="index").format(escape="latex")
        caption = self.caption().replace("%", r"\%").replace("_", r"\_")
        latex: str = style.to_latex(hrules=True, caption=caption, position_float="centering")
        return latex

    def to_csv(self) -> str:
        """Return the table as CSV, with unrounded numbers."""
        return self.table().to_csv(index=False)

    def save(self, folder: str | Path) -> Path:
        """Write table.txt, table.md, table.tex and table.csv into a folder and return it."""
        path = writable_folder(folder)
        write_text(path / "table.txt", self.to_text())
        write_text(path / "table.md", self.to_markdown())
        write_text(path / "table.tex", self.to_latex())
        write_text(path / "table.csv", self.to_csv())
        return path

    def printable(self, percent: str = "%") -> pd.DataFrame:
        """Return the table as it is printed, rounded."""
        table = self.table()
        interval = [
            f"{100 * low:.1f} to {100 * high:.1f}"
            for low, high in zip(table["low"], table["high"], strict=True)
        ]
        return pd.DataFrame(
            {
                "model": table["model"],
                "attack": table["attack"],
                f"accuracy {percent}": [f"{100 * v:.1f}" for v in table["accuracy"]],
                f"95{percent} interval": interval,
                "images": table["images"],
            }
        )


def report_of(
    done: Done, settings: dict[str, Any], protocol: Protocol, images: Tensor, name: str = "defended"
) -> Report:
    """Return the report of finished shards, on some or all of the run's `images`."""
    records, adversarial = done.shard
    return Report(
        settings=settings,
        protocol=protocol,
        records=records,
        adversarial=adversarial,
        originals=images[torch.tensor(records["image"].to_numpy(copy=True))].cpu(),
        chain_steps=done.costs["steps"],
        seconds=done.costs["seconds"],
        name=name,
    )


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
