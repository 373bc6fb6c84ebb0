"""What a run found: tables for people and for papers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.eval.judging.definitions import definition_table
from ebm_defense.eval.judging.sanity_checks import SanityChecks
from ebm_defense.eval.judging.statistics import are_verdicts
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.reporting import captions
from ebm_defense.eval.reporting.flags.evidence import Evidence, Flag
from ebm_defense.eval.reporting.flags.registry import raise_flags
from ebm_defense.eval.reporting.renderers import Printable
from ebm_defense.eval.reporting.report_lines import columns_of, lines_of, numbers_of
from ebm_defense.eval.reporting.results import Results
from ebm_defense.eval.reporting.table import Table
from ebm_defense.eval.storage.behaviour import IMAGES, Answers, Behaviour
from ebm_defense.eval.storage.columns import IMAGE, WORST_OF_ALL
from ebm_defense.eval.storage.run_folder import Done
from ebm_defense.storage.files import writable_folder, write_text


@dataclass(frozen=True, kw_only=True)
class Report(Results, Printable):
    """The outcome of `evaluate`: its results, and the tables that show them."""

    def table(self) -> pd.DataFrame:
        """Return accuracies by the protocol's own rule, a row for each model and attack."""
        return numbers_of(self)

    def definitions(self) -> pd.DataFrame:
        """Return accuracy by every definition in use, each beside its clean baseline.

        All from the same fresh draws of the images that were judged; of a published protocol's
        from draws that decided nothing of them.
        """
        names = {line.drawn: line.attack for line in lines_of(self) if line.drawn is not None}
        return definition_table(self.records, names, self.predicted_draws(), self.interval)

    def printed(self) -> Table:
        """Return the table as it is printed: a row an attack, a column a definition."""
        columns = columns_of(self, lines_of(self))
        return Table(
            columns=tuple(columns),
            rows=tuple(zip(*columns.values(), strict=True)),
            caption=captions.ACCURACIES,
            notes=(self._depends_on(),),
            footnotes=tuple(map(captions.flag_caption, self.flags)),
        )

    def caption(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        return self.printed().below

    def _depends_on(self) -> str:
        parts = not are_verdicts(self.outcomes(WORST_OF_ALL))
        return " ".join(
            [
                *([captions.shard_caption(self.settings)] if "shard" in self.settings else []),
                captions.protocol_caption(self.protocol, once=self.judged_once()),
                captions.verdict_caption(self.protocol, self.predicted_draws()),
                *captions.budget_caption(self.settings, self.protocol.attacks),
                f"{captions.defense_caption(self.settings['defense'])}.",
                f"{len(self.records)} images, {captions.intervals(self.interval, parts=parts)}, "
                f"seed {self.settings['seed']}.",
            ]
        )

    def save(self, folder: str | Path) -> Path:
        """Write table.txt, .md, .tex and .csv, definitions.csv and flags.toml into a folder."""
        path = writable_folder(folder)
        self.write(path, "table", "text", "markdown", "latex", "csv")
        write_text(path / "definitions.csv", self.definitions().to_csv(index=False))
        raised = [dataclasses.asdict(flag) for flag in self.flags]
        write_text(path / "flags.toml", tomli_w.dumps({"flag": raised}))
        return path


def report_of(
    done: Done,
    settings: dict[str, Any],
    protocol: Protocol,
    images: Tensor,
    sanity_checks: SanityChecks | None,
    name: str = "defended",
    answers: Answers | None = None,
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
        originals=images[torch.tensor(records[IMAGE].to_numpy(copy=True))].cpu(),
        chain_steps=done.costs["steps"],
        seconds=done.costs["seconds"],
        name=name,
        behaviour=None if answers is None else Behaviour(answers, images[:IMAGES].cpu()),
    )
