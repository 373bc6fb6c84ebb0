"""The lines of a report's table: each model, as it was and after each attack."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from ebm_defense.eval.judging.definitions import DEFINITIONS, label
from ebm_defense.eval.judging.rules import AsDeployed
from ebm_defense.eval.judging.statistics import Share
from ebm_defense.eval.reporting.captions import attack_title
from ebm_defense.eval.reporting.flags.evidence import Flag
from ebm_defense.eval.reporting.results import Results
from ebm_defense.eval.reporting.table import Cell, Column, share_cell
from ebm_defense.eval.storage.columns import (
    CLEAN,
    UNDEFENDED_ATTACKED,
    UNDEFENDED_CLEAN,
    WORST_OF_ALL,
    Kept,
    attack_column,
    column,
    stands_column,
)
from ebm_defense.purifiers.registry import kind_of


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        model, attack: what they are called.
        verdicts: their column in the records.
        drawn: under which name the records keep draws; None of a classifier that has none.
        number: of the attack; None where there is none, or where it is all of them.
    """

    model: str
    attack: str
    verdicts: str
    drawn: str | None = None
    number: int | None = None


def lines_of(run: Results) -> list[Line]:
    """Return what a report shows of a run."""
    attacks = list(enumerate(run.protocol.attacks))
    model = "undefended" if _is_bare(run) else "defended"
    lines = [*_undefended(run), Line(model, CLEAN, run.natural_column(), CLEAN)]
    for number, attack in attacks:
        then = "then " if run.passed_on() and number else ""
        title, name = f"{then}{attack_title(attack)}", attack_column(number, attack)
        lines.append(Line(model, title, stands_column(number, attack), name, number))
    if len(attacks) > 1:
        drawn = lines[-1].drawn if run.passed_on() else WORST_OF_ALL
        lines.append(Line(model, WORST_OF_ALL, WORST_OF_ALL, drawn))
    return lines


def _undefended(run: Results) -> list[Line]:
    if UNDEFENDED_CLEAN not in run.records:
        return []
    direct = run.protocol.attacks[-1].direct
    return [
        Line("undefended", CLEAN, UNDEFENDED_CLEAN),
        Line("undefended", direct.name, UNDEFENDED_ATTACKED),
    ]


def _is_bare(run: Results) -> bool:
    kind = kind_of(run.settings["defense"]["purifier"])
    return kind is not None and kind.identity


def numbers_of(run: Results) -> pd.DataFrame:
    """Return accuracies by the protocol's own rule, a row for each model and attack."""
    return pd.DataFrame([_numbers(line, run.share(line.verdicts)) for line in lines_of(run)])


def _numbers(line: Line, found: Share) -> dict[str, object]:
    return {
        "model": line.model,
        "attack": line.attack,
        "accuracy": found.value,
        "low": found.low,
        "high": found.high,
        "correct": found.right,
        "images": found.total,
    }


def columns_of(run: Results, lines: list[Line]) -> dict[Column, list[Cell]]:
    """Return the printed table column by column.

    The protocol's own rule comes first, where it is none of the definitions; theirs are from fresh
    draws of the same images.
    """
    shown = {
        Column("model"): [Cell(line.model, marks=_model_marks(run, line)) for line in lines],
        Column("attack"): [Cell(line.attack, marks=_attack_marks(run, line)) for line in lines],
    }
    if not isinstance(run.protocol.verdict, AsDeployed):
        own = [share_cell(run.share(line.verdicts)) for line in lines]
        shown[Column(f"{run.protocol.verdict.name} rule", "c")] = own
    for definition in DEFINITIONS:
        found = [_by(run, definition, line) for line in lines]
        if any(share for share, line in zip(found, lines, strict=True) if line.drawn):
            shown[Column(_label(run, definition), "c")] = list(map(share_cell, found))
    return shown


def _by(run: Results, definition: str, line: Line) -> Share | None:
    """Return accuracy by a definition; without a purifier it is the same by all."""
    if line.drawn is None:
        return run.share(line.verdicts)
    if column(line.drawn, Kept.DRAWS) not in run.records:
        return None
    return DEFINITIONS[definition](run.records, line.drawn, run.interval)


def _label(run: Results, definition: str) -> str:
    return label(definition, run.draws(), run.predicted_draws())


def _model_marks(run: Results, line: Line) -> tuple[int, ...]:
    """Return the marks of the flags that concern the model, and not the bare one beside it."""
    return () if line.drawn is None else _numbered(run.flags, None)


def _attack_marks(run: Results, line: Line) -> tuple[int, ...]:
    return () if line.number is None else _numbered(run.flags, line.number)


def _numbered(flags: tuple[Flag, ...], attack: int | None) -> tuple[int, ...]:
    """Return the marks of the flags that concern an attack, or (None) the model."""
    return tuple(
        i
        for i, flag in enumerate(flags, 1)
        if (attack in flag.attacks if flag.attacks else attack is None)
    )
