"""Intervals and paired tests: is a number exact enough, and is a difference real?

Everything is deterministic: resampling starts from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "cannot tell"]
Array = NDArray[np.float64]

RESAMPLES = 2000
PORTION = 1 << 18
ROUNDING = 1e-6
RARE = 10
"""Resamples below which a share of them says little."""
POWER = 0.8
"""Probability with which the number of questions that is asked for would show a difference of the size seen."""


class Interval(NamedTuple):
    """Where the true value lies with the stated confidence."""

    low: float
    high: float


def wilson(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927): sound for small n and near 0 and 1, where p +- z*se is not."""
    if n == 0:
        return Interval(0.0, 1.0)
    z = _z(confidence)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high)


def bootstrap(
    values: Sequence[float] | Array,
    weights: Sequence[float] | Array | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of sum(values) / sum(weights) over resampled questions (Efron 1979); a mean by default."""
    w = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    return percentiles(_ratios(np.asarray(values, float), w, seed), len(w), confidence)


def few(n: int, confidence: float = 0.95) -> bool:
    """Whether n of a kind may be chance, for as many coins often fall alike: up to 5 at 95 %."""
    return 2 * 0.5**n > 1 - confidence


def mean_interval(
    scores: Sequence[float], weights: Sequence[float] | None = None, *, confidence: float = 0.95
) -> Interval:
    """The interval of a mean score; weighted, sum(weights * scores) / sum(weights).

    Wilson's where every score is right or wrong, and where all but `few` scores from 0 to 1 are one number: what these
    few say of the rest is chance, and no scores of that mean vary more than right and wrong ones. Else the bootstrap.
    """
    of = np.asarray(scores, float)
    if weights is None and _right_or_wrong(of):
        return wilson(round(sum(scores)), len(scores), confidence)
    w: Array = np.ones(len(of)) if weights is None else np.asarray(weights, float)
    commonest = max(np.unique(of.round(6), return_counts=True)[1])
    if few(len(of) - int(commonest), confidence) and are_shares(of):
        n = effective(w)
        return wilson(float(of @ w / w.sum()) * n, n, confidence)
    return bootstrap(of * w, w, confidence)


def effective(weights: Array) -> float:
    """How many questions that weigh the same would be as sure (Kish, Survey Sampling, 1965)."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def difference_interval(values: Sequence[float] | Array, scale: float = 1.0, confidence: float = 0.95) -> Interval:
    """The interval of a mean difference of which few are not 0: Wald's with one more of the whole `scale` each way.

    What `flips_interval` is for differences of 1 and -1. It does not shrink to a point where all are the same.
    """
    more = np.append(values, (scale, -scale))
    return _wald(float(more.mean()), float((more**2).mean()), len(more), confidence)


def average_interval(counts: Sequence[tuple[int, int]], confidence: float = 0.95) -> Interval:
    """The interval of the mean of several shares that count the same; `counts` are successes and n of each.

    Wilson's for as many questions as would be as sure in one sample (the effective sample size; Korn and Graubard,
    Survey Methodology 24, 1998): it keeps its coverage where a share of few is 1, which resampling calls certain.
    """
    mean = math.fsum(k / n for k, n in counts) / len(counts)
    variances = [k / n * (1 - k / n) / (n - 1) if n > 1 else mean * (1 - mean) for k, n in counts]
    variance = math.fsum(variances) / len(counts) ** 2
    effective = mean * (1 - mean) / variance if variance else len(counts) ** 2 / math.fsum(1 / n for _, n in counts)
    return wilson(mean * effective, effective, confidence)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _wald(mean: float, square: float, n: float, confidence: float) -> Interval:
    """Wald's interval of a mean of n values, by the mean of their squares."""
    half = _z(confidence) * math.sqrt(max(0.0, square - mean**2) / n)
    return Interval(mean - half, mean + half)


def percentiles(values: Array, n: int, confidence: float = 0.95) -> Interval:
    """The interval between which that share of `values`, (RESAMPLES,), lies, as much below as above.

    Expanded by what resamples of `n` questions vary too little (Hesterberg, Am. Stat. 69, 2015, section 5.3): with ten,
    the share alone holds the truth nine times in ten where it says 95 %.
    """
    z = _z(confidence)
    if n > 1:
        z = _student(z, n - 1) * math.sqrt(n / (n - 1))
    tail = NormalDist().cdf(-z)
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's distribution where z is the normal one's (Abramowitz and Stegun 1964, 26.7.5)."""
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + math.fsum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def resampled(table: Array, seed: int = 0) -> Array:
    """Sums over resampled rows of a table (n, k), (RESAMPLES, k); in portions, so that memory stays small."""
    rng = np.random.default_rng(seed)
    n = len(table)
    portion = max(1, PORTION // n)
    sums = []
    for first in range(0, RESAMPLES, portion):
        drawn = rng.integers(0, n, (min(portion, RESAMPLES - first), n))
        sums.append(np.stack([column[drawn].sum(1) for column in table.T], axis=1))
    return np.concatenate(sums)


def _ratios(values: Array, weights: Array, seed: int) -> Array:
    """Ratios of the sums of RESAMPLES resamples, (RESAMPLES,)."""
    sums = resampled(np.stack([values, weights], axis=1), seed)
    found: Array = sums[:, 0] / sums[:, 1]
    return found


def _right_or_wrong(scores: Array) -> bool:
    """Whether all are 0 or 1, but for rounding: rouge-chinese calls a perfect reply 0.999999995."""
    return bool((np.abs(scores - scores.round()) < ROUNDING).all() and np.isin(scores.round(), (0.0, 1.0)).all())


def are_shares(scores: Sequence[float] | Array) -> bool:
    """Whether all are from 0 to 1, but for rounding."""
    of = np.asarray(scores, float)
    return bool((of > -ROUNDING).all() and (of < 1 + ROUNDING).all())


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that gains and losses are equally likely (McNemar 1947, binomial form)."""
    n = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (n - i) // (i + 1)  # n over i + 1
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def flips_interval(gained: float, lost: float, n: float, confidence: float = 0.95) -> Interval:
    """Interval of (gained - lost) / n, the difference of two proportions on the same n questions.

    Wald's with one more flip each way (Bonett and Price, J. Educ. Behav. Stat. 37, 2012): it keeps its coverage also
    where few questions flip, and does not shrink to a point where none did, as resampling would.
    """
    low, high = _wald((gained - lost) / (n + 2), (gained + lost + 2) / (n + 2), n + 2, confidence)
    return Interval(max(-1.0, low), min(1.0, high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that one false alarm among all of them is as rare as in one test.

    Step-down method (Holm, Scand. J. Stat. 6, 1979); valid however the tests depend on each other.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def flips_needed(gained: int, lost: int, n: int, alpha: float = 0.05, power: float = POWER) -> int | None:
    """Questions with which McNemar's test would find flips at the rates seen; None where both rates are equal.

    Connor, Biometrics 43 (1987): (z_a sqrt(q) + z_b sqrt(q - d^2))^2 / d^2, with q the share of questions that flip
    and d the difference of the two directions.
    """
    difference, flipped = (gained - lost) / n, (gained + lost) / n
    if not difference:
        return None
    z_a, z_b = _z(1 - alpha), NormalDist().inv_cdf(power)
    root = z_a * math.sqrt(flipped) + z_b * math.sqrt(max(0.0, flipped - difference**2))
    return math.ceil((root / difference) ** 2)


def mean_needed(difference: float, deviation: float, alpha: float = 0.05, power: float = POWER) -> int | None:
    """Pairs with which a mean difference would be found, where one pair's deviates by `deviation`; None for 0.

    The normal approximation of the paired t-test: ((z_a + z_b) deviation / difference)^2.
    """
    if not difference:
        return None
    z = _z(1 - alpha) + NormalDist().inv_cdf(power)
    return max(2, math.ceil((z * deviation / difference) ** 2))


@dataclass(frozen=True)
class Change:
    """What changed between two measurements of the same questions.

    `difference` is after - before with its interval; `gained` and `lost` count the questions that did better and worse.
    `deviation` is that of one question's difference, None where they are right or wrong. `needed` is how many questions
    would show a difference of this size where these cannot; None where no number would.
    """

    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    deviation: float | None
    improved: bool
    p: float
    verdict: Verdict = "cannot tell"
    needed: int | None = None

    def decided(self, p: float, alpha: float, tests: int = 1) -> Change:
        """The same with what may be said at that p-value; `tests` share the level `alpha` in planning for more."""
        if p < alpha:
            return replace(self, verdict="better" if self.improved else "worse", needed=None)
        if self.deviation is None:
            needed = flips_needed(self.gained, self.lost, self.n, alpha / tests)
        else:
            needed = mean_needed(self.difference, self.deviation, alpha / tests)
        return replace(self, verdict="cannot tell", needed=needed)


def paired(
    before: Sequence[float], after: Sequence[float], *, weights: Sequence[float] | None = None,
    lower_is_better: bool = False, confidence: float = 0.95, seed: int = 0,
) -> Change:  # fmt: skip
    """Compare the two scores of each question; totals are sum(scores) / sum(weights).

    Right-or-wrong scores are decided by McNemar's exact test; others by the paired bootstrap of the difference, whose
    p-value cannot be below that of a sign test of the pairs that differ. Where only a `few` do, the interval is
    `difference_interval`; its scale is 1, of scores beyond 0 and 1 and of ratios the largest difference seen. Raises
    ValueError for lists of unequal length or none.
    """
    if len(before) != len(after) or not before:
        raise ValueError("paired scores must be of the same questions, and at least one")
    a, b = np.asarray(before, float), np.asarray(after, float)
    flips = weights is None and _right_or_wrong(np.concatenate([a, b]))
    if flips:
        a, b = a.round(), b.round()
    w = np.ones(len(a)) if weights is None else np.asarray(weights, float)
    rose, fell = int((b > a).sum()), int((b < a).sum())
    gained, lost = (fell, rose) if lower_is_better else (rose, fell)
    total = float(w.sum())
    difference = float((b - a).sum()) / total
    if flips:
        interval, p, deviation = flips_interval(rose, fell, len(a), confidence), mcnemar(rose, fell), None
    else:
        drawn = _ratios(b - a, w, seed)
        p = max(_two_sided(drawn), mcnemar(0, rose + fell))
        each = (b - a - difference * w) * len(a) / total + difference  # so that their mean is the difference
        interval, deviation = percentiles(drawn, len(a), confidence), float(np.std(each))
        if few(rose + fell, confidence):
            bounded = weights is None and are_shares(np.concatenate([a, b]))
            interval = difference_interval(each, 1.0 if bounded else float(np.abs(each).max()), confidence)
    change = Change(
        len(a), float(a.sum()) / total, float(b.sum()) / total, difference, interval.low, interval.high, gained, lost,
        deviation, (difference < 0) == lower_is_better, p,
    )  # fmt: skip
    return change.decided(p, 1 - confidence)


def _two_sided(drawn: Array) -> float:
    """How often resampled differences lie on the other side of 0, both ways (Efron and Tibshirani 1993, chapter 15).

    Where next to none does, the tail of a normal distribution of their mean and deviation says how rare it is: many
    tests together need p-values below 1 / RESAMPLES.
    """
    beyond = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    counted = min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
    deviation = float(drawn.std())
    if beyond >= RARE or not deviation:
        return counted
    return min(counted, math.erfc(abs(float(drawn.mean())) / deviation / math.sqrt(2)))
