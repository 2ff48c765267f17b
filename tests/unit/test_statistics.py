"""Intervals and paired tests against published or independently computed values."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsets.statistics import bootstrap, mcnemar, paired, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_proportion_and_mirrors(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low))


def test_no_question_says_nothing() -> None:
    assert wilson(0, 0) == (0, 1)


def test_bootstrap_of_many_values_is_the_normal_interval() -> None:
    rng = random.Random(1)
    values = [rng.gauss(5, 2) for _ in range(2000)]
    mean, half = sum(values) / 2000, 1.96 * 2 / 2000**0.5
    assert bootstrap(values) == pytest.approx((mean - half, mean + half), abs=0.015)


def test_bootstrap_repeats_and_weighs() -> None:
    values, weights = [1.0, 4.0, 10.0, 2.0] * 5, [1.0, 2.0, 5.0, 1.0] * 5
    assert bootstrap(values, weights) == bootstrap(values, weights)
    low, high = bootstrap(values, weights)
    assert 1 < low < 17 / 9 < high <= 2
    assert bootstrap([3.0, 6.0], [1.0, 2.0]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (1, 9, 0.021484375), (3, 3, 1.0)]
)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_all_outcomes_as_unlikely(gained: int, lost: int) -> None:
    n = gained + lost
    unlikely = sum(comb(n, i) for i in range(n + 1) if comb(n, i) <= comb(n, gained)) / 2**n
    assert mcnemar(gained, lost) == pytest.approx(unlikely)


def test_mcnemar_of_thousands_is_finite() -> None:
    assert mcnemar(3000, 2000) < 1e-40
    assert mcnemar(2500, 2500) == 1


def test_a_change_that_changes_nothing_cannot_be_told() -> None:
    for scores in ([0.0, 1.0] * 50, [0.3, 0.9, 0.1] * 30):
        change = paired(scores, scores)
        assert (change.verdict, change.difference, change.low, change.high) == ("cannot tell", 0, 0, 0)


def test_right_and_wrong_answers_are_decided_by_mcnemar() -> None:
    before = [1.0] * 50 + [0.0] * 50
    lost_ten = [0.0] * 10 + [1.0] * 40 + [0.0] * 50
    worse = paired(before, lost_ten)
    assert (worse.verdict, worse.gained, worse.lost, worse.p) == ("worse", 0, 10, pytest.approx(2 / 2**10))
    assert (worse.before, worse.after, worse.difference) == pytest.approx((0.5, 0.4, -0.1))
    assert worse.low < -0.1 < worse.high < 0
    assert paired(lost_ten, before).verdict == "better"
    swapped = [0.0] * 5 + [1.0] * 45 + [1.0] * 5 + [0.0] * 45
    assert paired(before, swapped).verdict == "cannot tell"
    assert paired(before, [0.0] * 5 + [1.0] * 45 + [0.0] * 50).verdict == "cannot tell"  # p = 0.0625


def test_scores_in_between_are_decided_by_the_bootstrap() -> None:
    rng = random.Random(2)
    before = [rng.random() for _ in range(200)]
    after = [x + rng.gauss(0.1, 0.2) for x in before]
    change = paired(before, after)
    assert change.verdict == "better"
    assert change.p is None
    assert change.low < change.difference < change.high
    assert paired(before, after, lower_is_better=True).verdict == "worse"
    assert paired(before, [x + rng.gauss(0, 0.2) for x in before]).verdict == "cannot tell"


def test_few_pairs_decide_nothing() -> None:
    assert paired([0.1] * 5, [0.9] * 5).verdict == "cannot tell"
    assert paired([0.1] * 6, [0.9] * 6).verdict == "better"


def test_weights_make_it_a_ratio_of_sums() -> None:
    change = paired([10.0, 40.0] * 10, [11.0, 48.0] * 10, weights=[10.0, 20.0] * 10, lower_is_better=True)
    assert (change.before, change.after) == pytest.approx((50 / 30, 59 / 30))
    assert (change.verdict, change.gained, change.lost) == ("worse", 0, 20)


def test_unequal_lists_are_a_mistake() -> None:
    for before, after in (([1.0], []), ([], [])):
        with pytest.raises(ValueError, match="same questions"):
            paired(before, after)


def test_false_alarms_are_rare() -> None:
    """Two noisy measurements of one model differ "really" in about one case in twenty, not more."""
    rng = random.Random(3)
    alarms = 0
    for _ in range(100):
        difficulty = [rng.random() for _ in range(60)]
        before, after = ([float(rng.random() < d) for d in difficulty] for _ in range(2))
        alarms += paired(before, after).verdict != "cannot tell"
    assert alarms <= 9
