"""`ebm-defense merge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ebm_defense.eval.merge import merge


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Put the parts of a run together that `evaluate --shard i/n` made on separate machines.

    The records, images and tables are those of one uninterrupted run.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the parts."""
    out: Path
    """Folder of the whole run."""

    def run(self) -> int:
        """Check, merge, print the table."""
        report = merge(self.runs, self.out)
        print(f"{report.to_text()}\nEverything was saved in {self.out}")
        return 0
