"""Intervals of shares."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from ebm_defense import UsageError
from ebm_defense.eval.judging.statistics import (
    bootstrap_difference,
    mcnemar,
    mean_share,
    over_seeds,
    paired,
    share,
    sign_flip,
    worst_of,
)


def wilson(count: int, total: int, confidence: float) -> tuple[float, float]:
    """Wilson (1927), written out."""
    z, p = float(norm.ppf(0.5 + confidence / 2)), count / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    half = z / (1 + z * z / total) * spread
    return centre - half, centre + half


@st.composite
def counts(draw) -> tuple[int, int]:
    total = draw(st.integers(1, 10_000))
    return draw(st.integers(0, total)), total


@given(counts(), st.sampled_from([0.68, 0.95, 0.99]))
def test_the_interval_is_wilsons(count_and_total, confidence):
    found = share(*count_and_total, confidence)
    low, high = wilson(*count_and_total, confidence)
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)


@pytest.mark.parametrize(("name", "method"), [("wilson", "wilson"), ("clopper-pearson", "exact")])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_intervals_are_those_of_scipy(name, method, confidence):
    for count, total in [(0, 1), (1, 1), (0, 30), (3, 30), (30, 30), (511, 1000)]:
        expected = binomtest(count, total).proportion_ci(confidence, method)
        found = share(count, total, confidence, name)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(counts())
def test_the_interval_holds_the_share_and_stays_within_0_and_1(count_and_total):
    found = share(*count_and_total)
    assert found.value == count_and_total[0] / count_and_total[1]
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0


@given(counts())
def test_right_and_wrong_have_mirrored_intervals(count_and_total):
    count, total = count_and_total
    right, wrong = share(count, total), share(total - count, total)
    assert right.low == pytest.approx(1.0 - wrong.high, abs=1e-9)


@given(st.integers(1, 10_000))
def test_none_of_many_starts_at_0_and_all_of_many_ends_at_1(total):
    none, everything = share(0, total), share(total, total)
    assert (none.low, everything.high) == (0.0, 1.0)
    assert 0.0 < none.high < 1.0
    assert 0.0 < everything.low < 1.0


def test_no_images_say_nothing():
    found = share(0, 0)
    assert (found.low, found.high) == (0.0, 1.0)
    assert math.isnan(found.value)


@pytest.mark.parametrize(("total", "points"), [(64, 12), (256, 6), (512, 4.3), (1000, 3.1)])
def test_the_half_width_at_one_half_is_the_one_expected(total, points):
    found = share(total // 2, total)
    assert 50 * (found.high - found.low) == pytest.approx(points, abs=0.15)


# Coverage, by enumeration.

SHARES = np.array([*(i / 40 for i in range(41)), 0.001, 0.013, 0.487, 0.999])


def coverage(total: int, truths, interval: str):
    """The probability that the interval holds each truth: every count, weighted by its own."""
    ends = [share(count, total, interval=interval) for count in range(total + 1)]
    low, high = (np.array(v)[:, None] for v in ([s.low for s in ends], [s.high for s in ends]))
    held = (low - 1e-12 <= truths) & (truths <= high + 1e-12)
    return (binom.pmf(np.arange(total + 1)[:, None], total, truths) * held).sum(0)


@pytest.mark.parametrize("total", [1, 2, 3, 5, 8, 13, 21, 34, 55, 100])
def test_clopper_pearson_never_covers_less_than_it_says(total):
    assert coverage(total, SHARES, "clopper-pearson").min() >= 0.95 - 1e-12


@pytest.mark.parametrize("total", [1, 7, 20, 64])
def test_wilson_covers_exactly_what_inverting_the_score_test_covers(total):
    # A count's interval holds p if and only if |count − n·p| ≤ z·√(n·p·(1 − p)).
    z = float(norm.ppf(0.975))
    counted, mean = np.arange(total + 1)[:, None], total * SHARES
    accepted = abs(counted - mean) <= z * np.sqrt(mean * (1 - SHARES)) + 1e-9
    expected = (binom.pmf(counted, total, SHARES) * accepted).sum(0)
    assert coverage(total, SHARES, "wilson") == pytest.approx(expected, abs=1e-9)


def test_wilsons_coverage_is_near_its_level_but_no_bound():
    found = coverage(100, np.linspace(0.1, 0.9, 33), "wilson")
    assert 0.92 < found.min() < 0.95 < found.max() < 0.98
    assert found.mean() == pytest.approx(0.95, abs=0.006)


def test_an_unknown_interval_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="wilson, clopper-pearson"):
        share(1, 2, interval="wald")


# Images that count in part.


@given(counts())
def test_values_of_0_and_1_get_wilsons_interval(count_and_total):
    count, total = count_and_total
    found = mean_share([1.0] * count + [0.0] * (total - count))
    assert found == pytest.approx(share(count, total), abs=1e-9)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=50))
def test_means_that_lie_closer_together_have_no_wider_intervals(values):
    found = mean_share(values)
    mean = found.value
    assert 0.0 <= found.low <= mean <= found.high <= 1.0
    spread = mean_share([1.0] * len(values) + [0.0] * len(values))
    if abs(mean - 0.5) < 1e-3:
        assert found.high - found.low <= math.sqrt(2.0) * (spread.high - spread.low) + 1e-6


def test_an_interval_over_seeds_covers_what_images_are_drawn_from():
    generator, seeds, images, runs = np.random.default_rng(0), 3, 60, 1500
    # Each image has its own chance to stand; the truth is the mean over all images.
    chance = generator.beta(0.6, 0.4, size=(runs, images))
    verdicts = generator.random((seeds, runs, images)) < chance
    found = [over_seeds(verdicts[:, i]) for i in range(runs)]
    covered = sum(s.low <= 0.6 <= s.high for s in found)
    # Wilson's at the mean, for seeds whose mean varies less than a coin: it covers more.
    assert covered > 0.95 * runs


def test_seeds_that_agree_are_worth_one():
    verdict = [1] * 30 + [0] * 10
    assert over_seeds([verdict] * 5) == pytest.approx(share(30, 40), abs=1e-9)


@pytest.mark.parametrize("rows", [[], [[1, 0], [1]]])
def test_seeds_of_different_images_are_refused(rows):
    with pytest.raises(UsageError, match="same images"):
        over_seeds(rows)


def test_values_off_the_scale_are_refused():
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        mean_share([0.5, 1.2])


# Two defenses on the same images.


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(first, second):
    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, abs=1e-12)


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[int], list[int]]:
    """Verdicts of two defenses with these numbers of images in each cell."""
    return (
        [1] * both + [1] * first + [0] * second + [0] * neither,
        [1] * both + [0] * first + [1] * second + [0] * neither,
    )


def test_a_paired_comparison_counts_images_that_one_defense_alone_gets_right():
    found = paired(*pairs(40, 12, 3, 5))
    assert (found.only_first, found.only_second) == (12, 3)
    assert found.difference == pytest.approx(9 / 60)
    assert found.p_value == mcnemar(12, 3)
    assert 0.0 < found.low < found.difference < found.high


def test_pairing_is_worth_more_than_two_intervals():
    found = paired(*pairs(50, 10, 1, 39))
    first, second = share(60, 100), share(51, 100)
    assert found.low > 0.0
    assert first.low < second.high


def test_pairs_that_never_differ_have_an_interval_around_0():
    found = paired(*pairs(20, 0, 0, 10))
    assert found.p_value == 1.0
    assert found.low < 0.0 == found.difference < found.high


def test_the_bootstrap_covers_the_difference_as_often_as_it_says():
    generator, runs = np.random.default_rng(1), 200
    cells = generator.multinomial(80, [0.5, 0.2, 0.08, 0.22], size=runs)
    ends = [bootstrap_difference([1.0] * a + [-1.0] * b + [0.0] * (80 - a - b), seed=i)
            for i, (_, a, b, _) in enumerate(cells)]  # fmt: skip
    covered = sum(low <= 0.12 <= high for low, high in ends)
    assert 0.91 * runs < covered < 0.985 * runs


def test_the_bootstrap_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    first, second = pairs(40, 12, 3, 5)
    assert paired(first, second, seed=3) == paired(first, second, seed=3)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [([1, 0], [1], "same images"), ([], [], "same images"), ([1.5], [1], r"\[0, 1\]")],
)
def test_verdicts_that_cannot_be_paired_are_refused(first, second, word):
    with pytest.raises(UsageError, match=word):
        paired(first, second)


# The worst of several draws.


@pytest.mark.parametrize("draws", [1, 4, 7])
def test_worst_of_is_the_share_of_choices_without_a_failure(draws):
    for failures in range(draws + 1):
        fails = [i < failures for i in range(draws)]
        for worst in range(1, draws + 1):
            chosen = [not any(c) for c in combinations(fails, worst)]
            assert worst_of(failures, draws, worst) == pytest.approx(sum(chosen) / len(chosen))


@pytest.mark.parametrize(("rate", "draws", "worst"), [(0.2, 30, 10), (0.02, 150, 100)])
def test_worst_of_is_unbiased(rate, draws, worst):
    chances = binom.pmf(range(draws + 1), draws, rate)
    mean = sum(c * worst_of(k, draws, worst) for k, c in enumerate(chances))
    assert mean == pytest.approx((1 - rate) ** worst, rel=1e-9)


@pytest.mark.parametrize(
    ("failures", "draws", "worst"), [(3, 2, 1), (-1, 5, 2), (1, 5, 6), (0, 5, 0)]
)
def test_a_worst_that_cannot_be_estimated_is_refused(failures, draws, worst):
    with pytest.raises(UsageError, match="draws"):
        worst_of(failures, draws, worst)


# Shares of predictions, two defenses on the same images.


def test_the_sign_flip_test_of_verdicts_is_mcnemars():
    first, second = pairs(4, 7, 2, 3)
    differences = np.array(first) - np.array(second)
    assert sign_flip(differences) == pytest.approx(mcnemar(7, 2))


def test_the_sign_flip_test_keeps_its_level():
    generator = np.random.default_rng(0)
    found = [sign_flip(generator.normal(size=40).clip(-1, 1)) for _ in range(200)]
    assert np.mean(np.array(found) < 0.05) <= 0.08
    assert sign_flip(np.full(40, 0.1)) < 1e-3
    assert sign_flip(np.zeros(5)) == 1.0


def test_shares_are_compared_by_sign_flips_and_verdicts_by_mcnemar():
    first, second = np.full(30, 0.8), np.full(30, 0.7)
    assert paired(first, second).p_value == sign_flip(first - second)
    assert paired(first, second).only_first == 30


@given(st.lists(st.floats(0.0, 1.0), min_size=5, max_size=40))
def test_the_bootstrap_of_shares_is_within_wilsons_reach(values):
    wide, narrow = mean_share(values), mean_share(values, interval="bootstrap")
    assert narrow.value == wide.value
    assert 0.0 <= narrow.low <= narrow.high <= 1.0
    assert narrow.high - narrow.low <= 1.35 * (wide.high - wide.low)
