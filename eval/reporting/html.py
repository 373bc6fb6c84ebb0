"""A run as one page of HTML that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ebm_defense.eval.judging.statistics import Share
from ebm_defense.eval.reporting.captions import attack_title
from ebm_defense.eval.reporting.figures.drawing import (
    draw_curve,
    draw_legend,
    inline_svg,
    step_canvas,
)
from ebm_defense.eval.reporting.page import data_uri, png, render
from ebm_defense.eval.reporting.report import Report
from ebm_defense.eval.reporting.table import interval, percent
from ebm_defense.eval.storage.columns import CLEAN, IMAGE, LABEL, Kept, attack_column, column
from ebm_defense.eval.storage.run_folder import ENVIRONMENT, read_toml

BREAKS = 12
STRIP = "purification.png"


def report_page(report: Report, folder: Path | None = None, strip: bytes | None = None) -> str:
    """Return a run's page: tables, figures, flags, breaks, costs and every setting.

    Args:
        report: the run.
        folder: its run folder, from which come the environment and the film strip.
        strip: another film strip, a PNG file's content.

    Raises:
        UsageError: a file of the folder is damaged.
    """
    last = report.protocol.attacks[-1]
    return render(
        "report.html",
        name=report.name,
        protocol=report.protocol.name,
        attack=attack_title(last),
        natural=_percent(report.share(CLEAN)),
        robust=_percent(report.robust()),
        table=report.to_html(),
        flags=report.flags,
        curve=_curve(report),
        seen=", by the attack's own replicates" if report.judged_once() else "",
        strip=_strip(folder, strip),
        breaks=list(confident_breaks(report)),
        costs=_costs(report),
        settings=[*_flat(report.settings), *_flat(_environment(folder), "environment")],
    )


def confident_breaks(report: Report, most: int = BREAKS) -> Iterator[dict[str, Any]]:
    """Yield the images that the last attack broke, those with the fewest right draws first.

    Where predictions are counted, those that most of them had right before and most have wrong.
    """
    name = attack_column(len(report.protocol.attacks) - 1, report.protocol.attacks[-1])
    found = report.records[
        (report.natural() > 0.5) & (report.records[column(name, Kept.STANDS)] < 0.5)
    ]
    step = column(name, Kept.CHOSEN_AT if report.judged_once() else Kept.BROKEN_AT)
    columns = [IMAGE, LABEL, step, column(name, Kept.VOTES)]
    ranked = found.sort_values(column(name, Kept.VOTES), kind="stable").head(most)
    for row, (image, label, step, votes) in zip(
        ranked.index, ranked[columns].to_numpy().tolist(), strict=True
    ):
        original, adversarial = report.originals[row], report.adversarial[name][row]
        difference = adversarial - original
        scale = 0.5 / max(float(difference.abs().max()), 1e-9)
        yield {
            "image": int(image),
            "label": int(label),
            "step": int(step),
            "votes": f"{100 * votes:.0f}%",
            "original": png(original),
            "adversarial": png(adversarial),
            "difference": png(0.5 + scale * difference),
            "scale": f"{scale:.1f}",
        }


def _percent(found: Share) -> str:
    return f"{percent(found.value)}% ({interval(found)})"


def _curve(report: Report) -> str | None:
    shown = [i for i, attack in enumerate(report.protocol.attacks) if attack.looks > 1]
    if not shown:
        return None
    figure, axis = step_canvas()
    for colour, number in enumerate(shown):
        title = attack_title(report.protocol.attacks[number])
        draw_curve(axis, report, colour, number, title, of=len(shown))
    draw_legend(axis)
    return inline_svg(figure)


def _strip(folder: Path | None, strip: bytes | None) -> str | None:
    file = None if folder is None else folder / STRIP
    if strip is None and file is not None and file.is_file():
        strip = file.read_bytes()
    return None if strip is None else data_uri(strip, "image/png")


def _costs(report: Report) -> Sequence[tuple[str, str, str]]:
    phases = {**report.chain_steps, **report.seconds}
    return [
        (p, f"{report.chain_steps.get(p, 0):,.0f}", f"{report.seconds.get(p, 0.0):,.1f}")
        for p in phases
    ]


def _environment(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / ENVIRONMENT
    return read_toml(file) if file is not None and file.is_file() else {}


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings by their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{i}]")
    else:
        yield path, str(value)
