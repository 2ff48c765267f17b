"""Intervals and paired tests against published or independently computed values."""

from __future__ import annotations

import random
from math import comb, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsets.statistics import (
    bootstrap,
    difference_interval,
    flips_interval,
    flips_needed,
    holm,
    mcnemar,
    mean_interval,
    mean_needed,
    paired,
    wilson,
)


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


def test_the_interval_of_a_mean_is_wilsons_where_answers_are_right_or_wrong() -> None:
    assert mean_interval([1.0] * 81 + [0.0] * 182) == wilson(81, 263)
    between = [i / 20 for i in range(20)]
    assert mean_interval(between) == bootstrap(between)
    assert mean_interval(between, [2.0] * 20) == pytest.approx(bootstrap(between))


def test_no_scores_are_surer_than_right_and_wrong_ones_because_they_are_few_or_the_same() -> None:
    """Resampling calls certain what it saw of one question, or of forty that by chance have one score."""
    assert mean_interval([0.9]) == wilson(0.9, 1)
    assert mean_interval([0.9] * 40) == pytest.approx(wilson(36, 40))
    assert mean_interval([0.5] + [1.0] * 39) == pytest.approx(wilson(39.5, 40))
    assert mean_interval([0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(wilson(2, 5))
    assert mean_interval([0.5, 1.0], [6.0, 6.0]) == pytest.approx(wilson(1.5, 2))
    low, high = mean_interval([0.5, 1.0], [1.0, 9.0])
    assert low < wilson(1.9, 2)[0]  # next to one question
    assert low < 0.95 < high
    assert mean_interval([12.0, 30.0]) == bootstrap([12.0, 30.0])  # a scale of its own


@pytest.mark.parametrize("n", [3, 7, 10, 20])
def test_the_interval_of_a_mean_of_few_covers_the_truth(n: int) -> None:
    """The percentiles alone hold it in 86 of 100 cases of seven questions."""
    draw = np.random.default_rng(n)
    samples = draw.beta(2, 4, (300, n))
    covered = sum(low <= 1 / 3 <= high for low, high in (mean_interval(list(one)) for one in samples)) / 300
    assert covered > 0.9


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), max_size=60))
def test_the_interval_of_differences_is_that_of_flips_where_they_are_flips(differences: list[float]) -> None:
    low, high = difference_interval(differences)
    expected = flips_interval(differences.count(1.0), differences.count(-1.0), len(differences))
    assert (max(-1.0, low), min(1.0, high)) == pytest.approx(expected)


@pytest.mark.parametrize("count", [1, 5])
def test_few_pairs_exclude_little(count: int) -> None:
    """Two equal replies, or five that are a little better, are no proof; nor of one that is measured in other units."""
    same = paired([0.5] * count, [0.5] * count)
    assert (same.low, same.high) == flips_interval(0, 0, count)
    assert paired([0.5], [0.9]).low < -0.5
    assert paired([50.0], [90.0]).low < 0
    assert paired([500.0], [520.0], weights=[100.0]).low < 0
    assert paired([0.5] * 112, [0.5] * 112).low == flips_interval(0, 0, 112).low
    apart = paired([0.5] * 112, [0.5] * 108 + [0.6] * 4)
    assert apart.low < 0 < apart.difference < apart.high < 0.05


PROBABILITIES = ((0.01, 0.01), (0.05, 0.05), (0.1, 0.02), (0.2, 0.2), (0.3, 0.05), (0.001, 0.03))


def outcomes(n: int, up: float, down: float) -> list[tuple[float, int, int]]:
    """Probability of every number of gains and losses among n questions."""
    return [
        (comb(n, g) * comb(n - g, d) * up**g * down**d * (1 - up - down) ** (n - g - d), g, d)
        for g in range(n + 1)
        for d in range(n - g + 1)
    ]


@pytest.mark.parametrize(("up", "down"), PROBABILITIES)
def test_the_interval_of_flips_covers_the_truth(up: float, down: float) -> None:
    """Summed over all outcomes, not sampled: at least the stated 95 % (to a point, it is an approximation)."""
    for n in (10, 30):
        covered = sum(
            p for p, g, d in outcomes(n, up, down) if (i := flips_interval(g, d, n)).low <= up - down <= i.high
        )
        assert covered > 0.94


@given(st.integers(1, 200), st.data())
def test_the_interval_of_flips_mirrors_and_narrows(n: int, data: st.DataObject) -> None:
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    low, high = flips_interval(gained, lost, n)
    assert -1 <= low < high <= 1
    assert low <= (gained - lost) / n + 1e-9
    assert high >= (gained - lost) / n - 1e-9
    assert flips_interval(lost, gained, n) == pytest.approx((-high, -low))
    more = flips_interval(10 * gained, 10 * lost, 10 * n)
    assert more.high - more.low < high - low
    sure = flips_interval(gained, lost, n, 0.99)
    assert sure.low <= low < high <= sure.high


def test_holm_as_in_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(p, "holm")
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1, 1]


@given(st.lists(st.floats(0, 1), max_size=20), st.randoms())
def test_holm_is_between_none_and_bonferroni_and_keeps_the_order(values: list[float], random_: random.Random) -> None:
    corrected = holm(values)
    for p, q in zip(values, corrected, strict=True):
        assert p <= q <= min(1, p * len(values)) or q == pytest.approx(p)
    assert [q for _, q in sorted(zip(values, corrected, strict=True))] == sorted(corrected)
    order = list(range(len(values)))
    random_.shuffle(order)
    assert holm([values[i] for i in order]) == [corrected[i] for i in order]


@pytest.mark.parametrize(("gained", "lost", "n"), [(2, 8, 50), (5, 20, 100), (0, 10, 100), (10, 2, 60)])
def test_as_many_questions_as_needed_show_flips_with_the_stated_power(gained: int, lost: int, n: int) -> None:
    """Summed over all outcomes; the exact test is a little more careful than the formula's normal one."""
    needed = flips_needed(gained, lost, n)
    assert needed
    assert 0.72 < sum(p for p, g, d in outcomes(needed, gained / n, lost / n) if mcnemar(g, d) < 0.05) < 0.86


@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 200))
def test_fewer_questions_are_needed_for_what_is_plainer(gained: int, lost: int, n: int) -> None:
    needed = flips_needed(gained, lost, n)
    assert (needed is None) == (gained == lost)
    assert flips_needed(lost, gained, n) == needed
    if needed:
        assert flips_needed(gained, lost, n, alpha=0.01) >= needed  # type: ignore[operator]
        assert flips_needed(gained, lost, n, power=0.9) >= needed  # type: ignore[operator]
        assert flips_needed(gained + lost, 0, n) <= needed  # type: ignore[operator]


def test_the_size_of_a_paired_t_test() -> None:
    """34 pairs for an effect of half a deviation and 199 for a fifth (R: power.t.test), of which 2 are due to t."""
    assert mean_needed(0.5, 1.0) == 32
    assert mean_needed(-0.2, 1.0) == 197
    assert mean_needed(0, 1.0) is None
    z = NormalDist().inv_cdf(0.975) - 0.5 * sqrt(32)
    assert 1 - NormalDist().cdf(z) == pytest.approx(0.8, abs=0.01)


def test_a_change_that_changes_nothing_cannot_be_told() -> None:
    for scores in ([0.0, 1.0] * 50, [0.3, 0.9, 0.1] * 30):
        change = paired(scores, scores)
        assert (change.verdict, change.difference, change.p, change.needed) == ("cannot tell", 0, 1, None)
        assert change.low <= 0 <= change.high
    assert paired([1.0] * 8, [1.0] * 8).low < -0.2  # eight questions without a flip exclude little


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
    assert change.p < 0.01
    assert change.needed is None
    assert change.low < change.difference < change.high
    assert paired(before, after, lower_is_better=True).verdict == "worse"
    same = paired(before, [x + rng.gauss(0, 0.2) for x in before])
    assert same.verdict == "cannot tell"
    assert same.needed
    assert same.needed > 200


def test_a_plain_difference_stands_among_hundreds_of_tests() -> None:
    """Resampling alone would never give a p-value below 1 in 1000."""
    rng = random.Random(4)
    before = [rng.random() for _ in range(200)]
    plain = paired(before, [x + rng.gauss(0.1, 0.2) for x in before])
    assert plain.p < 1e-6
    assert max(holm([plain.p] * 300)) < 0.001


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


def test_rounding_makes_a_right_answer_no_less_right() -> None:
    """As in rouge-chinese, whose score of a perfect reply is 0.999999995; resampling would call 40 of 40 certain."""
    right = 0.999999995
    assert mean_interval([right] * 40) == wilson(40, 40)
    found = paired([right] * 40, [1.0] * 38 + [0.0] * 2)
    assert (found.gained, found.lost, found.p) == (0, 2, mcnemar(0, 2))
    assert paired([right] * 40, [1.0] * 40).low == flips_interval(0, 0, 40).low
