"""One table, many forms: what is in it stands in each, and a file of data holds it unrounded."""

from __future__ import annotations

import html
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebm_defense.eval.judging.statistics import share
from ebm_defense.eval.reporting.renderers import RENDERERS
from ebm_defense.eval.reporting.table import (
    NONE,
    Cell,
    Column,
    Table,
    interval,
    percent,
    plain_table,
    share_cell,
)

FOUND = share(30, 40)
TABLE = Table(
    columns=(Column("defense"), Column("clean", "c"), Column("cost", "r")),
    rows=(
        (Cell("a long name", marks=(2,)), share_cell(FOUND, (2, 1), best=True), Cell("1,400")),
        (Cell("b"), share_cell(None), Cell("7")),
    ),
    caption="Accuracy in %.",
    notes=("Forty images.", "Seed 0."),
    footnotes=("random: it is.", "blind: it is not."),
)
WORDS = ("defense", "clean", "cost", "a long name", "75.0", "59.8 to 85.8", "1,400")
SAID = ("Accuracy in %.", "Forty images. Seed 0.", "[1] random: it is.", "[2] blind: it is not.")


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_every_form_holds_every_word(form: str) -> None:
    printed = html.unescape(RENDERERS[form](TABLE))
    assert not [word for word in (*WORDS, *SAID, NONE, "[1, 2]") if word not in printed]


def test_latex_holds_every_word_escaped() -> None:
    printed = RENDERERS["latex"](TABLE)
    said = (word.replace("%", r"\%") for word in (*WORDS, *SAID))
    assert not [word for word in said if word not in printed.replace("\n", " ")]
    assert r"\begin{tabular}{lcr}" in printed


def test_what_stands_out_does_so_in_its_forms_own_way() -> None:
    shown = {"text": "*75.0*", "markdown": "**75.0**", "latex": r"\textbf{75.0}"}
    for form, bold in (shown | {"html": "<b>75.0</b>"}).items():
        assert RENDERERS[form](TABLE).count(bold) == 1


def test_text_is_aligned_words_to_the_left_and_numbers_to_the_right() -> None:
    head, first, second = RENDERERS["text"](TABLE).splitlines()[:3]
    assert head.startswith("defense ")
    assert first.startswith("a long name [2]  *75.0* (59.8 to 85.8) [1, 2]")
    assert head.index("cost") + 4 == len(first) == len(second)


def test_data_are_unrounded_and_nothing_is_no_number() -> None:
    read = pd.read_csv(io.StringIO(RENDERERS["csv"](TABLE)))
    assert list(read) == ["defense", "clean", "clean low", "clean high", "cost"]
    assert read.loc[0, ["clean", "clean low", "clean high"]].tolist() == pytest.approx(
        [FOUND.value, FOUND.low, FOUND.high], abs=0
    )
    assert read.loc[1, ["clean low", "clean high"]].isna().all()


VALUES = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans()


@given(st.lists(st.tuples(VALUES, st.floats(0, 1)), min_size=1, max_size=5))
def test_a_frame_comes_out_of_its_csv_as_it_went_in(rows: list[tuple[object, float]]) -> None:
    frame = pd.DataFrame(rows, columns=["x", "y"])
    assert RENDERERS["csv"](plain_table(frame)) == frame.to_csv(index=False)


def test_a_share_is_written_in_percent_and_rounded() -> None:
    assert (percent(0.12349), interval(FOUND)) == ("12.3", "59.8 to 85.8")


def test_a_table_of_which_nothing_is_said_ends_with_itself() -> None:
    bare = plain_table(pd.DataFrame({"n": [1, 22]}))
    assert RENDERERS["text"](bare) == "n\n1\n22\n"
