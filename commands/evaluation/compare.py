"""`ebm-defense compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ebm_defense.errors import UsageError
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.reporting.compare import compare


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put finished runs into one table, defenses by attacks, with intervals and tests."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    names: tuple[str, ...] = ()
    """What the table calls them; their folders' names if not given."""
    out: Path | None = None
    """Folder for the table as text, Markdown, LaTeX, CSV and HTML, and for the figures."""

    def run(self) -> int:
        """Load, compare, print, save."""
        if self.names and len(self.names) != len(self.runs):
            raise UsageError(f"{len(self.runs)} runs need as many names, not {len(self.names)}.")
        names = self.names or (None,) * len(self.runs)
        pairs = zip(self.runs, names, strict=True)
        comparison = compare([load_run(run, name=name) for run, name in pairs])
        print(comparison.to_text())
        if self.out is not None:
            print(f"Table and figures were saved in {comparison.save(self.out)}")
        return 0
