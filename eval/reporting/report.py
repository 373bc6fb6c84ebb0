"""What a run found: tables for people and for papers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import tomli_w
import torch
from torch import Tensor

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.job import WORST_OF_ALL, attack_column
from ebm_defense.eval.judging.definitions import DEFINITIONS, definition_table, label
from ebm_defense.eval.judging.rules import AsDeployed
from ebm_defense.eval.judging.sanity_checks import SanityChecks
from ebm_defense.eval.judging.selection import course_looks, course_right
from ebm_defense.eval.judging.statistics import (
    BOOTSTRAP,
    CONFIDENCE,
    Share,
    are_verdicts,
    mean_share,
    refuse_unknown,
)
from ebm_defense.eval.protocols.protocol import Protocol
from ebm_defense.eval.reporting import latex
from ebm_defense.eval.reporting.captions import attack_caption, defense_caption, verdict_caption
from ebm_defense.eval.reporting.flags import Evidence, Flag, raise_flags
from ebm_defense.eval.storage.run_folder import Done
from ebm_defense.files import writable_folder, write_text
from ebm_defense.purifiers.registry import kind_of

NONE = "–"


def inline(number: str, interval: str) -> str:
    """Return a number and its interval on one line."""
    return f"{number} ({interval})"


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        model, attack: what they are called.
        column: of the verdicts in the records.
        drawn: under which name the records keep draws; None of a classifier that has none.
    """

    model: str
    attack: str
    column: str
    drawn: str | None = None


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
        interval: of every number: a name in `INTERVALS`, or "bootstrap".
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
    interval: str = "wilson"

    def __post_init__(self) -> None:
        refuse_unknown(self.interval)

    def share(self, column: str) -> Share:
        """Return the mean of a column of verdicts in the records, with its interval over images.

        Images that the judge's rule left undecided count both ways: the interval runs from where
        all of them are broken to where all of them stand.
        """
        low, found, high = (
            mean_share(self.outcomes(column, doubt), interval=self.interval)
            for doubt in (0, None, 1)
        )
        return found._replace(low=low.low, high=high.high)

    def outcomes(self, column: str, doubt: int | None = None) -> pd.Series[Any]:
        """Return a verdict in [0, 1] an image; `doubt` on those left undecided, if it is given.

        The column `WORST_OF_ALL` is of the worst image that any attack found, chosen before it was
        judged; by a published protocol's rule it is 1 where an image stands under every attack.
        """
        if column == WORST_OF_ALL and f"{WORST_OF_ALL}: stands" in self.records:
            return self.outcomes(f"{WORST_OF_ALL}: stands", doubt)
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
        """Return the chain-steps of one prediction of which accuracy is: K times draws, or 0."""
        purifier = self.settings["defense"]["purifier"]
        draws = self.protocol.judge_replicates if purifier.get("stochastic", True) else 1
        if isinstance(self.protocol.verdict, AsDeployed):
            draws = self.predicted_draws()
        return float(purifier.get("steps", 0) * draws)

    def predicted_draws(self) -> int:
        """Return R, the draws that one prediction of the defense averages."""
        alone = self._draws() == 1 < self.protocol.judge_replicates
        return 1 if alone else int(self.settings["defense"].get("replicates", 1))

    def _draws(self) -> int:
        """Return H, on how many draws the definitions are: one of a deterministic defense."""
        drawn = self.records.get("clean: draws")
        return self.protocol.judge_replicates if drawn is None else int(drawn.max())

    def natural(self) -> pd.Series[Any]:
        """Return the verdict in [0, 1] on each image as it was, by the attacked ones' rule."""
        return self.outcomes(self._natural())

    def table(self) -> pd.DataFrame:
        """Return accuracies by the protocol's own rule, a row for each model and attack."""
        lines = self._lines()
        return pd.DataFrame([_row(x.model, x.attack, self.share(x.column)) for x in lines])

    def definitions(self) -> pd.DataFrame:
        """Return accuracy by every definition in use, each beside its clean baseline.

        All from the same fresh draws of the images that were judged; of a published protocol's
        from draws that decided nothing of them.
        """
        drawn = [line for line in self._lines() if line.drawn is not None]
        names = {str(line.drawn): line.attack for line in drawn}
        return definition_table(self.records, names, self.predicted_draws(), self.interval)

    def curve(self, attack: int = -1) -> pd.Series[float]:
        """Return accuracy after each attack step, the start being step 0.

        Where one image of each is judged: by the average of the attack's own replicates at that
        step, which were no reason to look. Of a long attack at some of its steps, evenly apart. By
        a published protocol's rule: what stands after every look so far.
        """
        number = range(len(self.protocol.attacks))[attack]
        one = self.protocol.attacks[number]
        name = attack_column(number, one)
        if f"{name}: course" in self.records:
            right = course_right(self.records[f"{name}: course"])
            steps = course_looks(one.looks)[: right.shape[1]]
            return pd.Series(right.mean(0), index=steps, name="robust accuracy")
        broken = self.records[f"{name}: broken at"]
        left = [1.0 - float(((broken >= 0) & (broken <= s)).mean()) for s in range(one.looks)]
        return pd.Series(left, name="robust accuracy")

    def final_title(self, attack: int = -1) -> str:
        """Return what the images that an attack of this number ends with are called."""
        return WORST_OF_ALL if self._passed_on() else attack_title(self.protocol.attacks[attack])

    def _lines(self) -> list[Line]:
        lines, model = [], self._model()
        if "undefended_clean" in self.records:
            direct = self.protocol.attacks[-1].direct
            lines += [
                Line("undefended", "none", "undefended_clean"),
                Line("undefended", direct.name, "undefended_attacked"),
            ]
        lines.append(Line(model, "none", self._natural(), "clean"))
        for number, attack in enumerate(self.protocol.attacks):
            then = "then " if self._passed_on() and number else ""
            title, name = f"{then}{attack_title(attack)}", attack_column(number, attack)
            lines.append(Line(model, title, f"{name}: stands", name))
        if len(self.protocol.attacks) > 1:
            drawn = lines[-1].drawn if self._passed_on() else WORST_OF_ALL
            lines.append(Line(model, WORST_OF_ALL, WORST_OF_ALL, drawn))
        return lines

    def _natural(self) -> str:
        """Return the column of the verdicts, by the protocol's own rule, on images as they were."""
        return "natural" if "natural" in self.records else "clean"

    def _passed_on(self) -> bool:
        """Return whether an attack got only what stood after those before it."""
        return self.protocol.ensemble and not self.judged_once()

    def judged_once(self) -> bool:
        """Return whether one image of each was judged, and that once, by whatever rule."""
        return "natural" not in self.records

    def _model(self) -> str:
        kind = kind_of(self.settings["defense"]["purifier"])
        bare = kind is not None and kind.identity
        return "undefended" if bare else "defended"

    def caption(self) -> str:
        """Return everything the numbers depend on, in sentences, and what the marks mean."""
        defense = defense_caption(self.settings["defense"])
        shard = f"Shard {self.settings['shard']} alone. " if "shard" in self.settings else ""
        return (
            f"{shard}Protocol {self.protocol.name}: {self._attacks()} "
            f"{verdict_caption(self.protocol, self.predicted_draws())} "
            f"{self._budget()}{defense}. {len(self.records)} images, {self._interval()}, "
            f"seed {self.settings['seed']}.{self._footnotes()}"
        )

    def _attacks(self) -> str:
        said = " ".join(attack_caption(a) for a in self.protocol.attacks)
        if self.protocol.ensemble and self.judged_once():
            said += " An attack spares the images that one before it surely broke."
        elif self.protocol.ensemble:
            said += " Each attack gets the images that still stand after those before it."
        if self.protocol.looks == "last":
            said += " Only the images that an attack ends with are judged."
        return said

    def _interval(self) -> str:
        """Return what the intervals are; of shares of predictions Wilson's covers more."""
        named = f"{CONFIDENCE:.0%} {self.interval.title()} intervals"
        parts = not are_verdicts(self.outcomes(WORST_OF_ALL))
        wide = parts and self.interval != BOOTSTRAP
        return f"{named} over images (conservative for shares)" if wide else named

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

    def _marked(self, lines: list[Line]) -> tuple[list[str], list[str]]:
        """Return the table's models and attacks with the marks of their flags."""
        columns = [line.column for line in lines]
        before = columns.index(stands_column(0, self.protocol.attacks[0]))
        own = columns.index(self._natural())  # the rows before are of the bare classifier beside it
        models = [m.model + self._marks(None) * (i >= own) for i, m in enumerate(lines)]
        attacks = [
            line.attack + (self._marks(i - before) if i >= before else "")
            for i, line in enumerate(lines)
        ]
        return models, attacks

    def to_text(self) -> str:
        """Return the table and its caption for a terminal."""
        return f"{self.printable().to_string(index=False)}\n\n{self.caption()}\n"

    def to_markdown(self) -> str:
        """Return the table and its caption as Markdown."""
        table = self.printable().to_markdown(index=False, disable_numparse=True)
        return f"{table}\n\n{self.caption()}\n"

    def to_latex(self) -> str:
        """Return the table as LaTeX with booktabs, its caption included."""
        shown = self.printable(latex.stacked)
        rows = [
            [*map(latex.words, row[:2]), *([NONE] if cell == NONE else cell for cell in row[2:])]
            for row in shown.to_numpy().tolist()
        ]
        return latex.table(
            list(shown.columns),
            rows,
            align="ll" + "c" * (shown.shape[1] - 2),
            caption="Accuracy in % before and after attack, and its interval.",
            notes=self.caption(),
        )

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

    def printable(self, cell: Callable[[str, str], Any] = inline) -> pd.DataFrame:
        """Return the table as it is printed: a row an attack, a column a definition.

        The protocol's own rule comes first, where it is none of the definitions; theirs are from
        fresh draws of the same images.

        Args:
            cell: writes a number and its interval, both in percent and rounded.
        """
        lines = self._lines()
        models, attacks = self._marked(lines)
        shown = pd.DataFrame({"model": models, "attack": attacks})
        if not isinstance(self.protocol.verdict, AsDeployed):
            own = [self.share(line.column) for line in lines]
            shown[f"{self.protocol.verdict.name} rule"] = [_cell(share, cell) for share in own]
        for definition in DEFINITIONS:
            found = [self._by(definition, line) for line in lines]
            if any(share for share, line in zip(found, lines, strict=True) if line.drawn):
                shown[self._label(definition)] = [_cell(share, cell) for share in found]
        return shown

    def _by(self, definition: str, line: Line) -> Share | None:
        """Return accuracy by a definition; without a purifier it is the same by all."""
        if line.drawn is None:
            return self.share(line.column)
        if f"{line.drawn}: draws" not in self.records:
            return None
        return DEFINITIONS[definition](self.records, line.drawn, self.interval)

    def _label(self, definition: str) -> str:
        return label(definition, self._draws(), self.predicted_draws())


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


def _cell(found: Share | None, cell: Callable[[str, str], Any]) -> Any:
    if found is None:
        return NONE
    ends = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
    return cell(f"{100 * found.value:.1f}", ends)


def stands_column(number: int, attack: Attack) -> str:
    """Return the records' column of which images stand after an attack."""
    return f"{attack_column(number, attack)}: stands"


def attack_title(attack: Attack) -> str:
    """Return an attack's name with how it differentiates the defense."""
    gradient = getattr(attack, "gradient", None)
    return f"{attack.name} ({gradient.name}+EOT)" if gradient else attack.name


def _row(model: str, attack: str, found: Share) -> dict[str, Any]:
    return {
        "model": model,
        "attack": attack,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "correct": found.right,
        "images": found.total,
    }
