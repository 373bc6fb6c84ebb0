"""LaTeX that pdflatex takes, whatever a name holds, and that stays within the text."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_defense.attacks import PGD, ThreatModel, Transfer
from ebm_defense.eval import Flag, Report, compare, evaluate
from ebm_defense.eval.reporting.latex import KNOWN, LETTERS, escape, stacked, table, words

PDFLATEX = shutil.which("pdflatex")
SIGNS = "".join(map(chr, [*range(32, 127), *range(160, 0x250), 0x4E2D, 0x1F600])) + "".join(KNOWN)
NASTY = "[1] a_b & 5% {x} #3 $y$ ^~\\ --steps ≤ ε·∇U − 0.1 × 中 <em>"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a_b & 5% #1 $x {y}", r"a\_b \& 5\% \#1 \$x \{y\}"),
        ("\\^~", r"\textbackslash{}\textasciicircum{}\textasciitilde{}"),
        ("a < b > c | d", "a $<$ b $>$ c $|$ d"),
        ("ε ≤ 0.1 − δ", r"$\varepsilon$ $\leq$ 0.1 $-$ $\delta$"),
        ("PGD-10 ×3", r"PGD-10 $\times$3"),
        ("--steps 3 – 4", r"-{}-steps 3 \textendash{} 4"),
        ("Ångström, naïve, Łódź", "Ångström, naïve, Łódź"),
        ("e\u0301", "é"),
        ("中 and 😀", "U+4E2D and U+1F600"),
        ("two\n lines\tone", "two lines one"),
    ],
)
def test_text_is_escaped(text, meant):
    assert escape(text) == meant


@given(st.text())
def test_no_text_leaves_a_special_character_bare(text):
    once = re.sub(
        r"\$[^$\\]*(\\[a-zA-Z]+)?\$|\\[a-zA-Z]+\{\}|\\[&%$#_{}]|-\{\}-|\$\^.+?\$", "", escape(text)
    )
    assert not set(once) & set("\\&%$#_^~<>|\n")
    assert all(c.isascii() or c in LETTERS or c < "\u0180" for c in once)


def test_a_long_name_is_set_in_lines():
    assert words("transfer PGD-40 from the undefended classifier", 20) == (
        "transfer PGD-40 from",
        "the undefended",
        "classifier",
    )
    assert words("") == ("",)


def test_headings_stand_at_the_bottom_and_cells_at_the_top():
    latex = table(
        ["a", "Langevin steps a prediction"],
        [[["x"], stacked("1.0", "0.5 to 1.5")], [["[y]"], ["2"]]],
        align="lr",
        caption="100%",
        notes="a_b",
    )
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert rows == [
        r" & Langevin steps \\",
        r"a & a prediction \\",
        r"x & 1.0 \\",
        r" & {\scriptsize 0.5 to 1.5} \\",
        r"{}[y] & 2 \\",  # a bare "[" would be taken for a row's distance
    ]
    assert r"\caption{100\%}" in latex
    assert r"a\_b}" in latex


# What pdflatex makes of it.


def compiled(body: str, folder) -> tuple[str, str]:
    """Return pdflatex's log and, where pdftotext is, the text that can be read."""
    head = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
    (folder / "paper.tex").write_text(f"{head}\n{body}\n\\end{{document}}\n", encoding="utf-8")
    stop = ("-interaction=nonstopmode", "-halt-on-error", "paper.tex")
    done = subprocess.run(
        [PDFLATEX, *stop], cwd=folder, stdout=subprocess.PIPE, check=False, timeout=120
    )
    log = (folder / "paper.log").read_text(encoding="utf-8", errors="replace")
    assert done.returncode == 0, log[-2000:]
    if shutil.which("pdftotext") is None:
        return log, ""
    reading = ["pdftotext", "-layout", "paper.pdf", "-"]
    read = subprocess.run(reading, cwd=folder, stdout=subprocess.PIPE, check=True, timeout=60)
    return log, read.stdout.decode()


@pytest.fixture
def report(langevin_defense, sample) -> Report:
    """A run with a long attack's name and flags of every kind of sign."""
    images = sample.images[:6, :, 4:12, 4:12].double()
    defense = langevin_defense(steps=1, replicates=2)
    attack = PGD(threat=ThreatModel(eps=0.1), steps=1, step_size=0.05, replicates=1)
    attacks = [Transfer(attack=attack, replicates=1), attack]
    report = evaluate(
        defense, images, defense(images).argmax(1), attacks=attacks, judge_replicates=2
    )
    flag = Flag(
        name="no_gradient", evidence=f"seen {NASTY}", advice="Do 100% & more.", attacks=(1,)
    )
    return dataclasses.replace(report, flags=(*report.flags, flag))


@pytest.mark.skipif(
    PDFLATEX is None, reason="no pdflatex here: apt-get install texlive-latex-recommended"
)
def test_pdflatex_sets_every_table_within_the_text(report, tmp_path):
    named = [dataclasses.replace(report, name=f"{NASTY} {i}") for i in range(3)]
    signs = rf"{{\raggedright {' '.join(map(escape, SIGNS))}\par}}"
    log, text = compiled(f"{report.to_latex()}\n{compare(named).to_latex()}\n{signs}", tmp_path)
    assert "Overfull" not in log
    assert "Missing character" not in log
    if text:
        for said in ("& 5% {x} #3 $y$", "--steps", "U+4E2D", "transfer PGD-1"):
            assert said in text
