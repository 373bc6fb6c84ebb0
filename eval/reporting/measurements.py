"""What of several runs can stand in one column: measured alike, judged alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ebm_defense.attacks.base import Attack
from ebm_defense.eval.reporting import captions
from ebm_defense.eval.reporting.captions import attack_caption, attack_details, attack_title
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.storage.columns import CLEAN, WORST_OF_ALL, stands_column


class Source(NamedTuple):
    """Where a run's records hold a measurement, and the numbers of the attacks behind it."""

    column: str
    attacks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing measured of some of the runs, a column of their comparison.

    Attributes:
        title: stands over the column.
        note: what was done, for the footnote.
        judged: how it was judged.
        sources: where its numbers are, by the run's number.
        alike: what runs share that share the column.
    """

    title: str
    note: str
    judged: str
    sources: dict[int, Source]
    alike: tuple[str, ...]


def measurements(reports: Sequence[Report], sweep: bool) -> list[Measurement]:
    """Return what runs measured, in common as far as it is the same.

    Args:
        reports: the runs.
        sweep: whether they are points of one sweep; see `compare`.
    """
    found: dict[object, Measurement] = {}
    for row, report in enumerate(reports):
        name = None if sweep else report.name
        for number, column in enumerate(_measured(row, report, sweep)):
            key = number if sweep else column.alike
            found[key] = _join(found[key], column, name) if key in found else column
    columns = sorted(found.values(), key=lambda c: c.title == WORST_OF_ALL)
    titles = [column.title for column in columns]
    marks = iter(range(1, len(titles) + 1))
    return [
        replace(c, title=f"{c.title} #{next(marks)}") if titles.count(c.title) > 1 else c
        for c in columns
    ]


def _join(first: Measurement, second: Measurement, name: str | None) -> Measurement:
    note, judged = first.note, first.judged
    if second.note not in note:
        # The points of a sweep differ in what their names say; a run of a name says it here.
        as_rows = AS_ROWS + note.removeprefix(AS_ROWS)
        note = as_rows if name is None else f"{note} for {name}, {second.note}"
    if judged != second.judged:
        judged = "Judged as each row says."
    return replace(first, note=note, judged=judged, sources=first.sources | second.sources)


AS_ROWS = "as each row says, else "


def _measured(row: int, report: Report, sweep: bool) -> Iterator[Measurement]:
    """Yield what a run measured; of an ensemble only the worst of all, which no order can change.

    The worst of all is one column for runs whose attacks differ in their gradients alone, since an
    attacker takes the one that fits the defense.
    """
    protocol = report.protocol
    note, judged = _clean_note(report), captions.verdict_caption(protocol, report.predicted_draws())
    yield Measurement(
        title=CLEAN, note=note, judged="", sources={row: Source(CLEAN, ())}, alike=(CLEAN, note)
    )
    numbered = list(enumerate(protocol.attacks))
    for number, attack in numbered if not protocol.ensemble else []:
        details = attack_details(attack)
        yield Measurement(
            title=_family(attack) if sweep else attack_title(attack),
            note=details,
            judged=judged,
            sources={row: Source(stands_column(number, attack), (number,))},
            alike=(protocol.name, attack.name, details, judged),
        )
    if len(numbered) > 1:
        yield Measurement(
            title=WORST_OF_ALL,
            note=_worst_note(report),
            judged=judged,
            sources={row: Source(WORST_OF_ALL, tuple(i for i, _ in numbered))},
            alike=(protocol.name, judged, *map(_but_gradient, protocol.attacks)),
        )


def _but_gradient(attack: Attack) -> str:
    gradient = getattr(attack, "gradient", None)
    said = attack_caption(attack)
    return said.replace(gradient.name, "") if gradient else said


def _clean_note(report: Report) -> str:
    if report.judged_once():
        return captions.CLEAN_ALIKE
    return captions.CLEAN_ONE_STAGE.format(draws=report.protocol.judge_replicates)


def _worst_note(report: Report) -> str:
    attacks = report.protocol.attacks
    if report.judged_once():
        return captions.WORST_SELECTED
    return (
        captions.ensemble_caption(attacks) if report.protocol.ensemble else captions.WORST_STANDING
    )


def _family(attack: Attack) -> str:
    """Return an attack's title without its number of steps, which a sweep may vary."""
    return attack_title(attack).replace(f"-{getattr(attack, 'steps', '')}", "", 1)
