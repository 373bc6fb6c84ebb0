"""Runs side by side: which image pairs with which, what is bold, what is drawn."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebm_defense import UsageError
from ebm_defense.attacks import PGD, Full, Smoothed, ThreatModel
from ebm_defense.eval import Flag, Protocol, Report, Sequential, TwoStage, compare
from ebm_defense.eval.judging.paired import unpaired
from ebm_defense.eval.judging.statistics import paired_p_value as mcnemar
from ebm_defense.eval.reporting.figures.plots import FIGURES, draw_figures

COUNT = 40


def made(name: str, clean: int, robust: int, *, eps=0.1, steps=10, chain=50, data="a", seed=0):
    """A report of so many right images, without running anything."""
    attack = PGD(threat=ThreatModel(eps=eps), steps=steps, step_size=eps / 4, replicates=2)
    column = f"0 {attack.name}"
    right = [int(i < clean) for i in range(COUNT)]
    stands = [int(i < robust) for i in range(COUNT)]
    records = {
        "image": range(COUNT),
        "label": 0,
        "clean": right,
        "natural": right,
        f"{column}: stands": stands,
        f"{column}: broken at": [-1 if s else i % (steps + 1) for i, s in enumerate(stands)],
        f"{column}: votes": 0.25,
    }
    purifier = {"kind": "LangevinPurifier", "steps": chain, "step_size": 0.1, "temperature": 0.1}
    return Report(
        settings={
            "seed": seed,
            "protocol": {"attacks": [{"eps": eps, "step_size": eps / 4, "steps": steps}]},
            "defense": {"replicates": 16, "purifier": purifier | {"precision": "fp32"}},
            "data": {"sha256": data, "images": COUNT},
        },
        protocol=Protocol(
            name="quick",
            attacks=(attack,),
            judge_replicates=8,
            verdict=TwoStage(),
            looks="every",
        ),
        records=pd.DataFrame(records),
        adversarial={column: torch.zeros(COUNT, 1, 4, 4)},
        originals=torch.zeros(COUNT, 1, 4, 4),
        chain_steps={"clean": COUNT * chain * 8, attack.name: COUNT * chain * 20},
        name=name,
    )


# The tests behind the bold print.


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_is_the_sign_test_of_the_images_that_changed(pairs):
    first, second = zip(*pairs, strict=True)
    ups, downs = (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    n, k = ups + downs, min(ups, downs)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_the_unpaired_test_is_fishers():
    # Fisher's tea: three of four right, one of four wrong.
    assert unpaired([1, 1, 1, 0], [1, 0, 0, 0]) == pytest.approx(34 / 70)


def test_bold_needs_every_other_row_beaten_beyond_doubt():
    strong, near, weak = made("strong", 36, 30), made("near", 36, 28), made("weak", 36, 5)
    sure, unsure = compare([weak, strong]), compare([weak, near, strong])
    assert sure.best(sure.columns[1]) == 1
    assert unsure.best(unsure.columns[1]) is None
    assert sure.best(sure.columns[0]) is None  # clean accuracies are alike
    assert compare([strong]).best(compare([strong]).columns[1]) is None


def test_bold_is_corrected_for_the_number_of_comparisons():
    # Six changes all one way: p = 2/64 = 0.031, enough for one comparison and not for two.
    top, second, third = made("top", 40, 26), made("second", 40, 20), made("third", 40, 20)
    assert mcnemar(*(r.records["0 PGD-10: stands"] for r in (top, second))) == pytest.approx(1 / 32)
    pair, trio = compare([top, second]), compare([top, second, third])
    assert pair.best(pair.columns[1]) == 0
    assert trio.best(trio.columns[1]) is None


def test_different_images_are_compared_unpaired_and_it_says_so():
    one, other = made("one", 36, 26, data="a"), made("other", 36, 20, data="b")
    found = compare([one, other])
    stands = [r.records["0 PGD-10: stands"] for r in (one, other)]
    assert found.p_value(found.columns[1], 0, 1) == unpaired(*stands) != mcnemar(*stands)
    assert "unpaired" in found.footnote()
    assert "unpaired" not in compare([one, made("twin", 36, 20)]).footnote()


# The table.


def test_attacks_of_other_settings_have_columns_of_their_own():
    found = compare([made("a", 36, 20, eps=0.1), made("b", 36, 20, eps=0.3)])
    assert [c.title for c in found.columns] == [
        "clean",
        "PGD-10 (BPDA+EOT) #1",
        "PGD-10 (BPDA+EOT) #2",
    ]
    assert found.share(0, found.columns[2]) is None
    assert "Linf 0.1" in found.columns[1].note
    assert "Linf 0.3" in found.columns[2].note
    assert [len(set(c.sources)) for c in found.columns] == [2, 1, 1]
    assert "–" in found.to_text()


def test_a_sweep_keeps_one_column_an_attack():
    points = [
        made(f"eps={e}, steps={s}", 36, 20, eps=e, steps=s) for e in (0.1, 0.2) for s in (2, 5)
    ]
    found = compare(points, heading="settings", sweep=True)
    assert [c.title for c in found.columns] == ["clean", "PGD (BPDA+EOT)"]
    assert len(found.columns[1].sources) == 4
    assert found.columns[1].note.startswith("as each row says, else Linf 0.1, 2 steps")
    assert "as each row says" not in compare(points[:1], sweep=True).footnote()


def test_of_an_ensemble_the_worst_of_all_is_compared():
    report = made("a", 36, 20)
    second = PGD(threat=ThreatModel(eps=0.1), steps=3, step_size=0.1, replicates=2)
    attacks = (*report.protocol.attacks, second)
    records = report.records.assign(**{"1 PGD-3: stands": [1] * 4 + [0] * (COUNT - 4)})
    protocol = dataclasses.replace(report.protocol, attacks=attacks, ensemble=True)
    found = compare([dataclasses.replace(report, protocol=protocol, records=records)])
    assert [c.title for c in found.columns] == ["clean", "worst of all"]
    assert found.share(0, found.columns[1]).right == 4
    assert "PGD-10: Linf 0.1" in found.footnote()
    assert "PGD-3: Linf 0.1" in found.footnote()


def through(name, gradient, second_stands, eps=0.1):
    """Return a report of two attacks, the second with this gradient."""
    report = made(name, 36, 20, eps=eps)
    second = PGD(threat=ThreatModel(eps=eps), steps=3, replicates=2, gradient=gradient)
    records = report.records.assign(**{"1 PGD-3: stands": second_stands})
    protocol = dataclasses.replace(report.protocol, attacks=(*report.protocol.attacks, second))
    return dataclasses.replace(report, protocol=protocol, records=records)


def test_the_worst_of_all_is_one_column_though_each_defense_has_its_own_gradient():
    stands = np.arange(COUNT) % 2
    reports = [through("a", Full(), stands), through("b", Smoothed(), 1 - stands)]
    found = compare(reports)
    *_, worst = found.columns
    assert [len(c.sources) for c in found.columns] == [2, 2, 1, 1, 2]
    assert worst.title == "worst of all"
    for row, report in enumerate(reports):
        both = report.records["0 PGD-10: stands"] & report.records["1 PGD-3: stands"]
        assert found.share(row, worst).right == both.sum() == report.robust().right
        assert report.table()["attack"].iloc[-1] == "worst of all"
    other = compare([reports[0], through("c", Full(), stands, eps=0.2)])
    assert [len(c.sources) for c in other.columns if "worst" in c.title] == [1, 1]


def undecided(report, doubtful):
    """Return a report whose judge has left the images of these numbers undecided."""
    marks = [int(i in doubtful) for i in range(COUNT)]
    return dataclasses.replace(
        report, records=report.records.assign(**{"0 PGD-10: undecided": marks})
    )


def test_undecided_images_widen_the_interval_and_can_cost_the_bold_print():
    top, other = made("top", 36, 26), made("other", 36, 16)
    plain, doubtful = compare([top, other]), compare([undecided(top, range(16, 26)), other])
    column = plain.columns[1]
    assert plain.best(column) == 0
    assert doubtful.best(doubtful.columns[1]) is None
    assert doubtful.share(0, doubtful.columns[1]).low < plain.share(0, column).low
    against = compare([top, undecided(other, range(16, 26))])
    assert against.best(against.columns[1]) is None
    nothing = compare([undecided(top, range(26)), other])  # perhaps much worse, and never bold
    assert nothing.best(nothing.columns[1]) is None


def flagged(report, *names):
    flags = [Flag(name=n, evidence=f"seen {n}", advice=f"Mend {n}.", attacks=a) for n, a in names]
    return dataclasses.replace(report, flags=tuple(flags))


def test_flags_follow_their_numbers_into_every_form():
    one = flagged(made("one", 36, 20), ("randomised output", ()), ("still falling", (0,)))
    two = flagged(made("two", 36, 15), ("no gradient", (0,)), ("still falling", (0,)))
    found = compare([one, two])
    assert "one [1]" in found.to_text()
    assert "50.0 (35.2 to 64.8) [2]" in found.to_text()
    assert "37.5 (24.2 to 53.0) [2, 3]" in found.to_markdown()
    assert "37.5 [2, 3]" in found.to_latex()
    assert "37.5 [2, 3]" in found.to_html()
    assert "[2] still falling: seen still falling (one, two). Mend still falling." in (
        found.footnote()
    )
    table = pd.read_csv(io.StringIO(found.to_csv()), keep_default_na=False)
    assert table["flags"].tolist() == ["", "", "still falling", "no gradient; still falling"]


def test_the_footnote_says_whether_anything_is_bold():
    strong, near, weak = made("strong", 36, 30), made("near", 36, 28), made("weak", 36, 5)
    assert "Bold: better than every other row" in compare([weak, strong]).footnote()
    assert "No row is bold" in compare([near, strong]).footnote()
    assert "bold" not in compare([strong]).footnote().lower()


def test_the_footnote_names_the_rule_of_the_verdict_once():
    reports = [made("a", 36, 20), made("b", 36, 10)]
    assert compare(reports).footnote().count("Judged on 8 fresh replicates (two-stage rule).") == 1
    protocol = dataclasses.replace(reports[1].protocol, verdict=Sequential())
    apart = compare([reports[0], dataclasses.replace(reports[1], protocol=protocol)])
    assert len(apart.columns) == 3
    assert "sequential test" in apart.footnote()


SAID = ("Linf 0.1", "10 steps", "2 replicates", "8 fresh", "50 Langevin", "40 images", "seed 0")


@pytest.mark.parametrize("form", ["to_text", "to_markdown", "to_latex", "to_html"])
def test_every_form_says_all_that_its_numbers_depend_on(form):
    printed = getattr(compare([made("weak_one", 36, 5), made("<strong>", 36, 30)]), form)()
    assert not [text for text in SAID if text not in printed]
    assert "75.0" in printed
    assert "59.8 to 85.8" in printed  # Wilson's interval of 30 of 40
    assert "1,400" in printed  # chain-steps an image in all: 50 × (8 + 20)
    assert "400" in printed  # of one prediction: 50 × 8


def test_the_best_is_marked_in_every_form():
    found = compare([made("weak", 36, 5), made("strong", 36, 30)])
    assert "*75.0* (" in found.to_text()
    assert "**75.0** (" in found.to_markdown()
    assert r"& \textbf{75.0} &" in found.to_latex()
    assert "<b>75.0</b>" in found.to_html()
    assert "12.5 (" in found.to_markdown()
    table = pd.read_csv(io.StringIO(found.to_csv()))
    assert table.loc[table["best"], "accuracy"].tolist() == [0.75]


def test_names_cannot_break_the_table():
    nasty = made("a_b & 5% <script>", 36, 5)
    assert "<script>" not in compare([nasty]).to_html()
    assert r"a\_b \& 5\%" in compare([nasty]).to_latex()


def test_latex_has_booktabs_rules_and_as_many_cells_as_columns():
    latex = compare([made("a", 36, 5), made("b", 36, 30)]).to_latex()
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert latex.count(rule) == 1
    assert r"\begin{tabular}{lccrr}" in latex
    rows = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert [row.count(" & ") for row in rows] == [4] * 6  # two lines each: head, a, b


def test_two_runs_of_one_name_are_refused():
    with pytest.raises(UsageError, match="called a"):
        compare([made("a", 3, 2), made("a", 3, 2)])
    with pytest.raises(UsageError, match="at least one"):
        compare([])


# The figures.


def drawn(reports) -> set[str]:
    return {name for name, figure in FIGURES.items() if figure.draw(reports) is not None}


def test_a_figure_is_drawn_where_there_are_data_for_it():
    base = {"accuracy-over-steps", "robust-against-natural", "robust-against-cost"}
    one = made("a", 36, 20)
    assert drawn([one]) == {"accuracy-over-steps"}
    assert drawn([one, made("b", 36, 10, seed=1)]) == base
    assert drawn([one, made("b", 36, 10, eps=0.2)]) == base | {"accuracy-over-eps"}
    assert drawn([one, made("b", 36, 10, chain=9)]) == base | {"accuracy-over-langevin-steps"}
    assert drawn([one, made("b", 36, 10, chain=9, eps=0.2)]) == base


def test_a_line_over_eps_holds_the_runs_accuracies():
    reports = [made("b", 36, 10, eps=0.2), made("a", 36, 20, eps=0.1), made("z", 36, 0, seed=4)]
    figure = FIGURES["accuracy-over-eps"].draw(reports)
    (line,) = [c.lines[0] for c in figure.axes[0].containers]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 50.0], [0.2, 25.0]])


def test_a_line_is_called_by_what_its_points_share():
    names = ["eps=0.1, K=5", "eps=0.2, K=5", "eps=0.1, K=9", "eps=0.2, K=9"]
    reports = [made(n, 36, 10, eps=float(n[4:7]), chain=int(n[-1])) for n in names]
    figure = FIGURES["accuracy-over-eps"].draw(reports)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["K=5", "K=9"]
    figure = FIGURES["accuracy-over-eps"].draw([made("a", 9, 8, eps=0.1), made("b", 9, 8, eps=0.2)])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a to b"]


def test_intervals_of_long_curves_stand_side_by_side():
    reports = [made(n, 36, 20, steps=50, seed=i) for i, n in enumerate("abc")]
    figure = FIGURES["accuracy-over-steps"].draw(reports)
    places = [[s[0][0] for s in c.get_segments()] for c in figure.axes[0].collections]
    everywhere = np.sort(np.concatenate(places))
    assert len(everywhere) > 20
    assert np.diff(everywhere).min() > 1.0


def test_a_curve_ends_with_a_stair_as_wide_as_the_others():
    figure = FIGURES["accuracy-over-steps"].draw([made("a", 36, 20), made("b", 36, 10, seed=1)])
    values, edges, _ = figure.axes[0].patches[0].get_data()
    np.testing.assert_allclose(values, 100 * made("a", 36, 20).curve())
    np.testing.assert_allclose(edges, np.arange(12) - 0.5)
    assert figure.axes[0].get_ylabel() == "robust accuracy %,\nPGD-10 (BPDA+EOT)"
    bars = [c.get_segments()[-1][0][0] for c in figure.axes[0].collections]
    assert len(set(bars)) == 2  # the last intervals stand side by side


def test_equal_costs_stand_side_by_side_and_accuracies_where_they_are():
    reports = [made("a", 36, 20), made("b", 36, 10, seed=1)]
    for name, apart in (("robust-against-cost", True), ("robust-against-natural", False)):
        figure = FIGURES[name].draw(reports)
        figure.canvas.draw()
        marks = [c.lines[0] for c in figure.axes[0].containers]
        places = [m.get_transform().transform(m.get_xydata())[0][0] for m in marks]
        assert (places[0] != places[1]) == apart


def test_a_prediction_costs_its_chain_times_the_draws_that_it_was_judged_on():
    report = made("a", 36, 20)
    assert report.prediction_cost() == 50 * 8
    settings = copy.deepcopy(report.settings)
    settings["defense"]["purifier"]["stochastic"] = False
    assert dataclasses.replace(report, settings=settings).prediction_cost() == 50
    del settings["defense"]["purifier"]["steps"]
    assert dataclasses.replace(report, settings=settings).prediction_cost() == 0


def test_everything_is_saved_and_the_same_runs_give_the_same_files(tmp_path):
    reports = [made("a", 36, 20), made("b", 36, 10, eps=0.2)]
    for name in ("one", "two"):
        compare(reports).save(tmp_path / name)
    names = {p.name for p in (tmp_path / "one").iterdir()}
    assert {f"comparison.{s}" for s in ("txt", "md", "tex", "csv", "html")} <= names
    assert {f"accuracy-over-eps.{s}" for s in ("png", "pdf", "svg")} <= names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_figures_of_one_run(tmp_path):
    files = draw_figures([made("a", 36, 20)], tmp_path)
    assert [f.name for f in files] == [f"accuracy-over-steps.{s}" for s in ("png", "pdf", "svg")]
