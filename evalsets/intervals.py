"""How sure the figures of a set are that stand beside its deciding one: an interval for each that questions add up to.

Most figures are means over questions, or ratios of sums over them: Wilson's interval where each question is right or
wrong, else the bootstrap. Corpus BLEU is computed of resampled questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evalsets.metrics.overlap import BLEU_TOKENIZERS
from evalsets.statistics import (
    ROUNDING,
    Interval,
    average_interval,
    bootstrap,
    mean_interval,
    percentiles,
    resampled,
)

Row = dict[str, Any]
ORDERS = 4
"""Longest n-gram of BLEU."""


class Part(NamedTuple):
    """What one question adds to a figure's sum, and to what that is divided by."""

    value: float
    weight: float = 1.0


def _score_of(wanted: Callable[[Row], bool]) -> Callable[[Row], Part | None]:
    return lambda row: Part(row["score"]) if wanted(row) else None


PARTS: dict[str, Callable[[Row], Part | None]] = {
    "checks": lambda row: Part(sum(row["kept"]), len(row["kept"])),
    "tool_call_f1": lambda row: Part(
        2 * bool(row["expected"] and row["parsed"]), bool(row["expected"]) + bool(row["parsed"])
    ),
    "schema_accuracy": lambda row: Part(float(row["valid"] == 1)) if row["parsed"] else None,
    "no_call": _score_of(lambda row: not row["expected"]),
    "refused": _score_of(lambda row: row["expected"] == "refuses"),
    "answered": _score_of(lambda row: row["expected"] == "answers"),
    "likelihood.acc": lambda row: Part(row["likely_score"]),
    "second.acc": lambda row: Part(0.0 if row["error"] else row["second_score"]),
}
"""Figures that are not the mean of what rows have under their name."""
METRICS = "metrics."
"""What a figure's name begins with that another program gave to each of its questions."""


def part(figure: str, row: Row) -> Part | None:
    """What a row adds to a figure; None for a question that this figure is not about."""
    if figure in PARTS:
        return PARTS[figure](row)
    if figure.startswith(METRICS):
        return Part(0.0 if row["error"] else row["metrics"].get(figure.removeprefix(METRICS), 0.0))
    value = row.get(figure)
    return Part(float(value)) if isinstance(value, int | float) else None


def interval(figure: str, rows: Sequence[Row], confidence: float = 0.95) -> Interval | None:
    """The interval of a figure over some rows; None for one that they do not add up to."""
    if figure == "bleu":
        return _bleu(rows, confidence)
    if figure == "macro":
        return _macro(rows, confidence)
    parts = [found for row in rows if (found := part(figure, row)) and found.weight]
    if not parts:
        return None
    means = [found.value / found.weight for found in parts]
    if len(set(means)) == 1 or all(found.weight == 1 for found in parts):
        return mean_interval(means, confidence)
    return bootstrap([found.value for found in parts], [found.weight for found in parts], confidence)


def intervals(total: Mapping[str, Any], headline: str, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """`{"intervals": {figure: {"low", "high"}}}` of the figures of a total but the headline; empty without any."""
    names = [name for name, value in total.items() if isinstance(value, float) and name != headline]
    names += [METRICS + name for name in total.get("metrics", ())] + ["second.acc"] * ("second" in total)
    found = {name: ends for name in names if (ends := interval(name, rows))}
    return {"intervals": {name: ends._asdict() for name, ends in found.items()}} if found else {}


def _macro(rows: Sequence[Row], confidence: float) -> Interval:
    """The mean accuracy of subjects, each of which counts the same."""
    subjects = sorted({row["subset"] for row in rows})
    scores = [[row["score"] for row in rows if row["subset"] == subject] for subject in subjects]
    return average_interval([(sum(score == 1 for score in of), len(of)) for of in scores], confidence)


def _bleu(rows: Sequence[Row], confidence: float) -> Interval:
    """Corpus BLEU of each language over resampled questions; of several, their mean weighted by questions."""
    drawn = np.zeros(())
    for seed, language in enumerate(sorted({row["language"] for row in rows})):  # draws of their own
        of = [row for row in rows if row["language"] == language]
        drawn = drawn + len(of) / len(rows) * _bleus(language, of, seed)
    if np.ptp(drawn) < ROUNDING:  # all perfect, or nothing right
        return mean_interval([float(drawn[0])] * len(rows), confidence)
    return percentiles(drawn, confidence)


def _bleus(language: str, rows: Sequence[Row], seed: int) -> Any:
    """BLEU of resamples from the counts that sacrebleu makes of each reply."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=BLEU_TOKENIZERS[language], effective_order=True)  # which it wants for single sentences
    of_each = [metric.sentence_score(row["reply"], [row["expected"]]) for row in rows]
    counted = np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in of_each], float)
    sums = resampled(counted, seed).round().astype(int).tolist()
    scores = (
        BLEU.compute_bleu(of[:ORDERS], of[ORDERS:-2], of[-2], of[-1], smooth_method="exp").score / 100 for of in sums
    )
    return np.fromiter(scores, float, len(sums))
