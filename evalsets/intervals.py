"""How sure the figures of a set are that stand beside its deciding one: an interval for each that questions add up to.

Most figures are means over questions, or ratios of sums over them: Wilson's interval where each question is right or
wrong, else the bootstrap. Corpus BLEU is computed of resampled questions. Beside another evaluation, the interval is of
the difference on the same questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evalsets.metrics.overlap import BLEU_TOKENIZERS
from evalsets.statistics import (
    ROUNDING,
    Array,
    Interval,
    are_shares,
    average_interval,
    difference_interval,
    effective,
    few,
    flips_interval,
    mean_interval,
    paired,
    percentiles,
    resampled,
)

Row = dict[str, Any]
Pairs = Sequence[tuple[Row, Row]]
ORDERS = 4
"""Longest n-gram of BLEU."""
COUNTS = 2 * ORDERS + 2
"""What BLEU is computed of: matches and n-grams of each order, lengths of replies and references."""


class Part(NamedTuple):
    """What one question adds to a figure's sum, and to what that is divided by."""

    value: float
    weight: float = 1.0


class Moved(NamedTuple):
    """A figure on both sides of `n` questions, and where the difference of the two lies."""

    n: int
    before: float
    after: float
    low: float
    high: float


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
    """The interval of a figure over some rows; None for one that they do not add up to, or that has no known scale and
    so few values that these do not tell how much others may differ."""
    if figure == "bleu":
        return _bleu(rows, confidence)
    if figure == "macro":
        return _macro(rows, confidence)
    parts = [found for row in rows if (found := part(figure, row)) and found.weight]
    if not parts:
        return None
    means, weights = [found.value / found.weight for found in parts], [found.weight for found in parts]
    if few(len(means), confidence) and not are_shares(means):
        return None
    alike = len(set(means)) == 1 or len(set(weights)) == 1
    return mean_interval(means, None if alike else weights, confidence=confidence)


def intervals(total: Mapping[str, Any], headline: str, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """`{"intervals": {figure: {"low", "high"}}}` of the figures of a total but the headline; empty without any."""
    names = [
        name for name, value in total.items() if isinstance(value, float) and name not in (headline, *Interval._fields)
    ]
    names += [METRICS + name for name in total.get("metrics", ())] + ["second.acc"] * ("second" in total)
    found = {name: ends for name in names if (ends := interval(name, rows))}
    return {"intervals": {name: ends._asdict() for name, ends in found.items()}} if found else {}


def moved(figure: str, pairs: Pairs, confidence: float = 0.95) -> Moved | None:
    """How a figure differs between the two rows of each pair; None for one that is no mean over the same questions."""
    if figure == "bleu":
        return _bleu_moved(pairs, confidence)
    if figure == "macro":
        return _macro_moved(pairs, confidence)
    parts = [(part(figure, a), part(figure, b)) for a, b in pairs]
    both = [(a, b) for a, b in parts if a and b]
    if not both or any(a.weight != b.weight for a, b in both):
        return None
    weights = [a.weight for a, _ in both]
    change = paired(
        [a.value for a, _ in both], [b.value for _, b in both],
        weights=None if set(weights) == {1.0} else weights, confidence=confidence,
    )  # fmt: skip
    return Moved(change.n, change.before, change.after, change.low, change.high)


def _macro(rows: Sequence[Row], confidence: float) -> Interval:
    """The mean accuracy of subjects, each of which counts the same."""
    subjects = sorted({row["subset"] for row in rows})
    scores = [[row["score"] for row in rows if row["subset"] == subject] for subject in subjects]
    return average_interval([(sum(score == 1 for score in of), len(of)) for of in scores], confidence)


def _macro_moved(pairs: Pairs, confidence: float) -> Moved:
    """The same of both sides: flips, of as many questions as those weigh that count as they do in the average."""
    size = Counter(b["subset"] for _, b in pairs)
    shares = np.array([1 / len(size) / size[b["subset"]] for _, b in pairs])
    before, after = (np.array([row["score"] == 1 for row in side]) for side in zip(*pairs, strict=True))
    n = effective(shares)
    gained, lost = (float(shares @ flipped) * n for flipped in (after & ~before, before & ~after))
    ends = flips_interval(gained, lost, n, confidence)
    return Moved(len(pairs), float(shares @ before), float(shares @ after), *ends)


def _bleu(rows: Sequence[Row], confidence: float) -> Interval:
    """Corpus BLEU of each language over resampled questions; of several, their mean weighted by questions."""
    drawn: Array = np.zeros(())
    for seed, language in enumerate(sorted({row["language"] for row in rows})):  # draws of their own
        of = [row for row in rows if row["language"] == language]
        drawn = drawn + len(of) / len(rows) * _bleus(language, of, seed)
    if np.ptp(drawn) < ROUNDING or few(len(rows), confidence):  # all perfect, or nothing right
        return mean_interval([float(drawn.mean())] * len(rows), confidence=confidence)
    return percentiles(drawn, len(rows), confidence)


def _bleu_moved(pairs: Pairs, confidence: float) -> Moved:
    """The same of both sides, of resamples with the same questions.

    Where but few replies differ in what BLEU counts, these are taken to have made all of the difference.
    """
    before = after = 0.0
    drawn: Array = np.zeros(())
    differ = 0
    for seed, language in enumerate(sorted({b["language"] for _, b in pairs})):
        of = [pair for pair in pairs if pair[1]["language"] == language]
        old, new = (_counted(language, side) for side in zip(*of, strict=True))
        sums, share = resampled(np.hstack([old, new]), seed), len(of) / len(pairs)
        drawn = drawn + share * (_scores(sums[:, COUNTS:]) - _scores(sums[:, :COUNTS]))
        before += share * float(_scores(old.sum(0, keepdims=True))[0])
        after += share * float(_scores(new.sum(0, keepdims=True))[0])
        differ += int((old != new).any(1).sum())
    low, high = percentiles(drawn, len(pairs), confidence)
    if few(differ, confidence):
        each = np.zeros(len(pairs))
        each[:differ] = (after - before) * len(pairs) / max(1, differ)
        low, high = difference_interval(each, 1.0, confidence)
    return Moved(len(pairs), before, after, max(-1.0, low), min(1.0, high))


def _bleus(language: str, rows: Sequence[Row], seed: int) -> Array:
    """BLEU of resamples, (RESAMPLES,)."""
    return _scores(resampled(_counted(language, rows), seed))


def _counted(language: str, rows: Sequence[Row]) -> Array:
    """What sacrebleu counts in each reply, (n, COUNTS); a corpus has the sums."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=BLEU_TOKENIZERS[language], effective_order=True)  # which it wants for single sentences
    of_each = [metric.sentence_score(row["reply"], [row["expected"]]) for row in rows]
    return np.array([[*s.counts, *s.totals, s.sys_len, s.ref_len] for s in of_each], float)


def _scores(sums: Array) -> Array:
    """BLEU of corpora by their counts, (corpora, COUNTS) -> (corpora,)."""
    from sacrebleu.metrics.bleu import BLEU

    scores = (
        BLEU.compute_bleu(of[:ORDERS], of[ORDERS:-2], of[-2], of[-1], smooth_method="exp").score / 100
        for of in sums.round().astype(int).tolist()
    )
    return np.fromiter(scores, float, len(sums))
