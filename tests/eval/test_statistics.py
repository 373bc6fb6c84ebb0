"""Intervals of shares."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from ebm_defense.eval.statistics import share


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
