"""Intervals and paired tests: is a number exact enough, and is a difference real?

Everything is deterministic: resampling starts from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "cannot tell"]

RESAMPLES = 2000
PORTION = 1 << 18
FEWEST_DIFFERENT = 6
"""With fewer pairs that differ, even a sign test on a unanimous outcome stays above 5 % (2 / 2^5)."""


class Interval(NamedTuple):
    """Where the true value lies with the stated confidence."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927): sound for small n and near 0 and 1, where p +- z*se is not."""
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(low, high)


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of sum(values) / sum(weights) over resampled questions (Efron 1979); a mean by default."""
    means = _resampled(
        np.asarray(values, float), np.ones(len(values)) if weights is None else np.asarray(weights), seed
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _resampled(values: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Ratios of RESAMPLES resamples, (RESAMPLES,); drawn in portions, so that memory stays at some megabytes."""
    rng = np.random.default_rng(seed)
    n = len(values)
    portion = max(1, PORTION // n)
    ratios = []
    for first in range(0, RESAMPLES, portion):
        drawn = rng.integers(0, n, (min(portion, RESAMPLES - first), n))
        ratios.append(values[drawn].sum(1) / weights[drawn].sum(1))
    return np.concatenate(ratios)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value that gains and losses are equally likely (McNemar 1947, binomial form)."""
    n = gained + lost
    term = tail = 1
    for i in range(min(gained, lost)):
        term = term * (n - i) // (i + 1)  # n over i + 1
        tail += term
    return min(1.0, 2 * tail / (1 << n))


@dataclass(frozen=True)
class Change:
    """What changed between two measurements of the same questions.

    `difference` is after - before with its interval; `gained` and `lost` count the questions that did better and worse.
    """

    n: int
    before: float
    after: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    verdict: Verdict
    p: float | None = None


def paired(
    before: Sequence[float], after: Sequence[float], *, weights: Sequence[float] | None = None,
    lower_is_better: bool = False, confidence: float = 0.95, seed: int = 0,
) -> Change:  # fmt: skip
    """Compare the two scores of each question; totals are sum(scores) / sum(weights).

    Right-or-wrong scores are decided by McNemar's exact test; others by whether the paired bootstrap interval of the
    difference excludes 0 and enough pairs differ at all. Raises ValueError for lists of unequal length or none.
    """
    if len(before) != len(after) or not before:
        raise ValueError("paired scores must be of the same questions, and at least one")
    a, b = np.asarray(before, float), np.asarray(after, float)
    w = np.ones(len(a)) if weights is None else np.asarray(weights, float)
    low, high = bootstrap((b - a).tolist(), w.tolist(), confidence, seed)
    rose, fell = int((b > a).sum()), int((b < a).sum())
    gained, lost = (fell, rose) if lower_is_better else (rose, fell)
    p = None
    if weights is None and set(np.unique([a, b]).tolist()) <= {0.0, 1.0}:
        p = mcnemar(gained, lost)
        real = p < 1 - confidence
    else:
        real = (low > 0 or high < 0) and gained + lost >= FEWEST_DIFFERENT
    total = float(w.sum())
    difference = float((b - a).sum()) / total
    improved = (difference < 0) == lower_is_better
    verdict: Verdict = "cannot tell" if not real else "better" if improved else "worse"
    return Change(
        len(a), float(a.sum()) / total, float(b.sum()) / total, difference, low, high, gained, lost, verdict, p
    )
