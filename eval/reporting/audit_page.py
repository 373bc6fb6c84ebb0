"""One page of an audit: its verdicts, the loss surface, accuracy by eps, and compression by K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ebm_defense.eval.audit import DISTANCES, Audited, AuditSettings, Check
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import Cell, Column, Table
from ebm_defense.storage.files import atomic

ATTACK, RANDOM = "#d55e00", "#0072b2"


def audit_text(name: str, checks: Sequence[Check], found: Audited, s: AuditSettings) -> str:
    """Return the page in Markdown: a verdict a line, and what it was measured by."""
    lines = [f"# Audit of {name}", ""]
    lines += [f"- **{'passed' if c.passed else 'FAILED'}** {c.name}: {c.found}." for c in checks]
    if found.compression:
        lines += ["", RENDERERS["markdown"](_compression(found)).rstrip("\n")]
    passed = sum(c.passed for c in checks)
    lines += [
        "",
        f"{passed} of {len(checks)} passed. {s.threat}, PGD of {s.steps} steps and {s.replicates} "
        f"replicates ({s.many} where many), Square of {s.queries} queries, {s.tries} random "
        f"perturbations an image, judged on {s.draws} fresh draws by their mean; "
        f"{len(found.clean)} images, 95% Wilson intervals, seed {s.seed}. Compression is "
        "‖P(x+δ;ω) − P(x;ω)‖/‖δ‖ at the same noise ω.",
    ]
    return "\n".join(lines) + "\n"


def _compression(found: Audited) -> Table:
    titles = ("steps K", "compression, attack", "compression, random")
    return Table(
        columns=tuple(Column(title, "r") for title in titles),
        rows=tuple(
            (Cell(f"{k}"), Cell(f"{attack:.3f}"), Cell(f"{at_random:.3f}"))
            for k, attack, at_random in found.compression
        ),
    )


def draw_audit(name: str, found: Audited, path: Path) -> None:
    """Draw the loss surface, accuracy by eps and compression by K to a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, sizes, compression = figure.subplots(1, 3)
    loss.plot(DISTANCES, found.along_gradient, "o-", color=ATTACK, label="to the attack")
    loss.plot(DISTANCES, found.along_random, "s--", color=RANDOM, label="at random")
    loss.set(title="loss surface", xlabel="distance / eps", ylabel="mean cross-entropy")
    loss.legend()
    curve = {0.0: _mean(found.clean), 1.0: _mean(found.plain)} | found.larger
    sizes.plot(list(curve), [100 * v for v in curve.values()], "o-", color=ATTACK)
    sizes.axhline(100 * found.chance, color="grey", linewidth=0.8, label="chance")
    sizes.set(title="accuracy under PGD", xlabel="multiple of eps", ylabel="%", ylim=(0, 100))
    sizes.legend()
    for column, colour, label in ((1, ATTACK, "attack"), (2, RANDOM, "random")):
        steps = [row[0] for row in found.compression]
        compression.plot(
            steps, [row[column] for row in found.compression], "o-", color=colour, label=label
        )
    compression.axhline(1.0, color="grey", linewidth=0.8)
    compression.set(title="compression rate", xlabel="steps K", ylabel="‖P(x+δ) − P(x)‖ / ‖δ‖")
    if found.compression:
        compression.legend()
    figure.suptitle(name)
    with atomic(path) as partial:
        figure.savefig(partial, dpi=110)


def _mean(stands: object) -> float:
    return float(stands.double().mean())  # type: ignore[attr-defined]
