"""What a second judgement of a run's saved images found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from ebm_defense.eval.judging.statistics import Share, mean_share, paired_p_value
from ebm_defense.eval.reporting import captions
from ebm_defense.eval.reporting.renderers import Printable
from ebm_defense.eval.reporting.table import Cell, Column, Table, share_cell
from ebm_defense.eval.storage.columns import Kept, column
from ebm_defense.storage.files import write_text

NAME = re.compile(r"verification-(\d+)\.toml")
COLUMNS = (
    Column("attack"),
    *(Column(title, "r") for title in ("before", "after", "newly broken", "newly right", "p")),
    Column("images", "r"),
)


@dataclass(frozen=True, kw_only=True)
class Verification(Printable):
    """What a second judgement of a run's saved images found.

    Attributes:
        settings: seed, replicates and the judging defense, as plain values.
        records: a row an image: for the originals ("clean") and each attack, the verdict before
            and now, in [0, 1], and the share of the fresh draws that were right.
        attacks: what was judged: the name in the records, and the title for tables.
    """

    settings: dict[str, Any]
    records: pd.DataFrame
    attacks: dict[str, str]

    def table(self) -> pd.DataFrame:
        """Return accuracy before and after, changes both ways and the paired test, by attack."""
        return pd.DataFrame([self._numbers(*named) for named in self.attacks.items()])

    def _verdicts(self, name: str) -> tuple[pd.Series[Any], pd.Series[Any]]:
        before, after = (self.records[column(name, w)] for w in (Kept.BEFORE, Kept.AFTER))
        return before, after

    def _numbers(self, name: str, title: str) -> dict[str, Any]:
        before, after = self._verdicts(name)
        return {
            "attack": title,
            **_ends("before", mean_share(before)),
            **_ends("after", mean_share(after)),
            "newly broken": float((before - after).clip(0).sum()),
            "newly right": float((after - before).clip(0).sum()),
            "p": paired_p_value(before, after),
            "images": len(before),
        }

    def printed(self) -> Table:
        """Return the table as it is printed, rounded."""
        return Table(
            columns=COLUMNS,
            rows=tuple(self._row(*named) for named in self.attacks.items()),
            caption=captions.BEFORE_AND_AFTER,
            notes=(captions.verification_caption(self.settings),),
        )

    def _row(self, name: str, title: str) -> tuple[Cell, ...]:
        numbers = self._numbers(name, title)
        counts = (f"{numbers[change]:.3g}" for change in ("newly broken", "newly right", "p"))
        return (
            Cell(title),
            *(share_cell(mean_share(verdicts)) for verdicts in self._verdicts(name)),
            *map(Cell, counts),
            Cell(str(numbers["images"])),
        )

    def save(self, folder: str | Path) -> Path:
        """Write verification-<n>.toml, .csv (the table) and -records.csv; return the first."""
        stem = f"verification-{next_number(Path(folder))}"
        write_text(Path(folder) / f"{stem}-records.csv", self.records.to_csv(index=False))
        self.write(Path(folder), stem, "csv")
        file = Path(folder) / f"{stem}.toml"
        write_text(file, tomli_w.dumps(self.settings))
        return file


def _ends(when: str, found: Share) -> dict[str, float]:
    return {when: found.value, f"{when} low": found.low, f"{when} high": found.high}


def next_number(folder: Path) -> int:
    """Return the number of a run folder's next verification, from 1."""
    names = [NAME.fullmatch(p.name) for p in folder.glob("verification-*.toml")]
    return 1 + max((int(found[1]) for found in names if found), default=0)
