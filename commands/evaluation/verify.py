"""`ebm-defense verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ebm_defense.commands.evaluation.evaluate import COMMAND, Evaluate
from ebm_defense.commands.main import from_file
from ebm_defense.commands.options.shared import Device, put_on, resolve_device
from ebm_defense.defense import PurifiedClassifier
from ebm_defense.errors import UsageError
from ebm_defense.eval.load_run import load_run
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.reporting.verification import next_number
from ebm_defense.eval.reverify import reverify
from ebm_defense.eval.storage.behaviour import another_part
from ebm_defense.interface.modes import evaluating
from ebm_defense.runtime.packing import Packing
from ebm_defense.storage.fingerprint import fingerprint
from ebm_defense.storage.weights import load_defense


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Judge a run's saved adversarial images again, and print what changed.

    By fresh draws of the run's own defense, or by another one, which tells how the saved images
    transfer. The outcome is kept in the run folder.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """A finished run."""
    defense: str | None = None
    """A shipped defense or a folder, instead of the run's own."""
    seed: int | None = None
    """Seed of the draws; a new one for each verification if not given."""
    replicates: int | None = None
    """Draws an image; as many as the run's judge drew if not given."""
    max_chains: int | None = None
    """Chains that run at a time, which bounds memory; if not given, 400 on a CPU and as many as
    fit on a GPU."""
    device: Device = "auto"
    """Where to compute."""

    def run(self) -> int:
        """Load, judge, keep, print."""
        report, device = load_run(self.folder), resolve_device(self.device)
        defense = put_on(self._defense(report), device)
        if self.defense is None:
            _refuse_changed(report, defense, device)
        found = reverify(
            report,
            defense,
            seed=self.seed,
            replicates=self.replicates,
            number=next_number(self.folder),
        )
        print(f"{found.to_text()}\nIt was saved as {found.save(self.folder)}")
        return 0

    def _defense(self, report: Report) -> PurifiedClassifier:
        if self.defense is not None:
            return load_defense(self.defense, max_chains=self.max_chains)
        file = self.folder / COMMAND
        if not file.exists():
            raise UsageError(f"{file} is missing, so name the run's defense with --defense.")
        own: PurifiedClassifier = from_file(Evaluate, str(file)).make_defense()
        if fingerprint(own) != report.settings["defense"]["weights"]:
            raise UsageError(
                f"the defense that {file} names has other weights now than in this run; name one "
                "with --defense to judge the images by it."
            )
        own.packing = Packing(self.max_chains)
        return own


def _refuse_changed(report: Report, defense: PurifiedClassifier, device: torch.device) -> None:
    """Refuse a run's own defense that answers otherwise than it did in the run."""
    if report.behaviour is None:
        return
    kept = report.behaviour._replace(images=report.behaviour.images.to(device))
    with evaluating(defense):
        part = another_part(kept, defense)
    if part is not None:
        raise UsageError(
            f"the {part} that {COMMAND} names answers differently now than in this run; name a "
            "defense with --defense to judge the images by it."
        )
