"""`ebm-defense report`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ebm_defense.commands.evaluation.evaluate import draw_breaks
from ebm_defense.commands.options.shared import Device, put_on, resolve_device
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.reporting.html import report_page
from ebm_defense.eval.reporting.report import Report
from ebm_defense.storage.files import write_text
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class WriteReport:
    """Write one self-contained HTML page of a finished run."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A finished run."""
    out: Path | None = None
    """The page; report.html in the run folder if not given."""
    name: str | None = None
    """What the page calls the defense; the folder's name if not given."""
    defense: str | None = None
    """A shipped defense or a folder, to draw the film strip of purification anew."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> int:
        """Load, write, say where."""
        report = load_run(self.folder, name=self.name)
        file = self.out or self.folder / "report.html"
        write_text(file, report_page(report, self.folder, self._strip(report)))
        print(f"The page is {file}")
        return 0

    def _strip(self, report: Report) -> bytes | None:
        if self.defense is None:
            return None
        defense = put_on(load_defense(self.defense), resolve_device(self.device))
        with tempfile.TemporaryDirectory() as folder:
            draw_breaks(defense, report, Path(folder) / "strip.png")
            return (Path(folder) / "strip.png").read_bytes()
