"""Draw how a verdict comes about, and what the definitions say of the same draws: docs/verdict.svg.

python docs/verdict.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from ebm_defense.defense import mean_logits
from ebm_defense.eval.judging.rules import as_deployed, has_majority, vote_counts
from ebm_defense.eval.judging.statistics import worst_of

INK, PAPER, RIGHT, WRONG, LINE = "#333333", "#ffffff", "#009e73", "#d55e00", "#0072b2"
DRAWS, PREDICTED, WORST, SEED = 32, 8, 10, 123
SIZE = (860, 430)


def text(x: float, y: float, words: str, **style: str) -> str:
    """Return a line of text; `style` is SVG's, with _ for -."""
    given = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x}" y="{y}" fill="{INK}"{given}>{words}</text>'


def box(x: float, y: float, width: float, height: float, title: str, *lines: str) -> str:
    """Return a box with a title and lines."""
    return "".join(
        [
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PAPER}" '
            f'stroke="{LINE}" stroke-width="2"/>',
            text(x + 12, y + 24, title, font_weight="bold"),
            *(text(x + 12, y + 46 + 18 * i, line) for i, line in enumerate(lines)),
        ]
    )


def arrow(x1: float, x2: float, y: float) -> str:
    """Return an arrow to the right."""
    return f'<path d="M{x1} {y} H{x2}" stroke="{INK}" stroke-width="2" marker-end="url(#to)"/>'


def drawn() -> torch.Tensor:
    """Return logits `[r, 1, 2]` of an image whose draws are right about two times in three."""
    generator = torch.Generator().manual_seed(SEED)
    margin = 0.6 + torch.randn(DRAWS, generator=generator)
    return torch.stack([margin, -margin], dim=-1)[:, None] / 2.0


def dots(logits: torch.Tensor) -> list[str]:
    """Return a mark a draw, in groups of as many as one prediction averages."""
    right = (logits[:, 0].argmax(-1) == 0).tolist()
    marks = []
    for i, good in enumerate(right):
        x = 40 + 22 * i + 22 * (i // PREDICTED)
        colour, sign = (RIGHT, "o") if good else (WRONG, "x")
        style = {"font_size": "20", "font_weight": "bold", "text_anchor": "middle"}
        marks.append(text(x, 222, sign, **style).replace(INK, colour))
    for number, group in enumerate(logits.split(PREDICTED)):
        start = 28 + 22 * (PREDICTED + 1) * number
        good = bool(group.mean(0)[0].argmax() == 0)
        marks.append(
            f'<rect x="{start}" y="202" width="{22 * PREDICTED}" height="30" rx="5" '
            f'fill="none" stroke="{RIGHT if good else WRONG}"/>'
        )
    return marks


def definitions(logits: torch.Tensor) -> list[tuple[str, str]]:
    """Return what each definition says of the draws, computed as the package does."""
    labels = torch.zeros(1, dtype=torch.int64)
    failures = int((logits[:, 0].argmax(-1) != 0).sum())
    deployed = float(as_deployed(logits, labels, mean_logits, PREDICTED)[0])
    mean = bool(mean_logits(logits)[0].argmax() == 0)
    majority = bool(has_majority(vote_counts(logits), labels)[0])
    return [
        ("as deployed", f"{deployed:.2f}: of the groups' averages, how many are right"),
        ("one pass (mean)", f"{1 - failures / DRAWS:.2f}: of single draws, how many are right"),
        ("mean logits", f"{mean:d}: whether the average of all draws is right"),
        ("majority", f"{majority:d}: whether most draws are right"),
        (
            f"worst of {WORST}",
            f"{worst_of(failures, DRAWS, WORST):.2f}: the chance that {WORST} draws are all right",
        ),
    ]


def draw() -> str:
    """Return the picture as SVG."""
    width, height = SIZE
    logits = drawn()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="14">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
        box(20, 20, 240, 105, "1. The attack proposes",
            "an image after each step,", "by draws of its own"),
        arrow(262, 308, 72),
        box(310, 20, 240, 105, "2. A selection chooses",
            "of the strongest few", "the worst one,", "by draws of its own"),
        arrow(552, 598, 72),
        box(600, 20, 240, 105, "3. The judge draws", "that one image, once:",
            f"{DRAWS} fresh draws", "that decided nothing before"),
        text(28, 175, "The judge's draws of one image (o right, x wrong), in groups of "
             f"{PREDICTED}, as many as one prediction averages:"),
        *dots(logits),
        text(28, 280, "What each definition says of this image:", font_weight="bold"),
    ]  # fmt: skip
    for i, (name, said) in enumerate(definitions(logits)):
        lines += [text(28, 308 + 22 * i, name), text(180, 308 + 22 * i, said)]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "verdict.svg").write_text(draw(), encoding="utf-8")
