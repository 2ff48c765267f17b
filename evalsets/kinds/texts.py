"""Question-and-answer sets: replies beside their references, by the metrics that the set names."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from statistics import fmean
from typing import Any

from evalsets import judge, metrics
from evalsets.ask import Reply
from evalsets.kinds.kind import Kind, Replies, Row, counts
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import mean_interval


def likeness(asked: Collection[str], language: str, reply: Reply, expected: str) -> dict[str, float]:
    """How far a reply is what was expected, by those of the metrics in `asked` that one reply has; 0 if it failed."""
    if reply.error:
        return dict.fromkeys((name for metric in asked if metric != "judge" for name in metrics.figures(metric)), 0.0)
    return metrics.likeness(asked, language, reply.text, expected)


def text_figures(asked: Collection[str], rows: list[Row]) -> dict[str, Any]:
    """The means of some rows' likeness, their corpus BLEU, and the interval of what `score` holds.

    What nobody graded is in no mean of grades, and counted as `ungraded`.
    """
    low, high = mean_interval([r["score"] for r in rows if r["score"] is not None])
    found = {**_means(asked, rows), "low": low, "high": high, **counts(rows)}
    return found | ({"ungraded": sum(r["judge"] is None for r in rows)} if "judge" in asked else {})


def _means(asked: Iterable[str], rows: list[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric in asked:
        if metric == "bleu":
            found["bleu"] = _bleu(rows)
        else:
            found |= {name: fmean(r[name] for r in rows if r[name] is not None) for name in metrics.figures(metric)}
    return found


def _bleu(rows: list[Row]) -> float:
    """Corpus BLEU of each language by its own tokenizer; of several, the mean weighted by questions."""
    total = 0.0
    for language in sorted({r["language"] for r in rows}):
        part = [r for r in rows if r["language"] == language]
        total += len(part) * metrics.bleu(language, [r["reply"] for r in part], [r["expected"] for r in part])
    return total / len(rows)


def _row(file: SetFile, question: Question, reply: Reply, replies: Replies) -> Row:
    row = {"expected": question.expected, **likeness(file.metrics, question.language, reply, question.expected)}
    if "judge" in file.metrics:
        row |= judge.graded(question.id, reply, replies)
    return row | {"score": row[metrics.headline(file.metrics)]}


def _figures(file: SetFile, rows: list[Row]) -> dict[str, Any]:
    if "judge" in file.metrics and all(r["judge"] is None for r in rows):
        why = next((r["error"] for r in rows if r["error"]), judge.NOT_ASKED)
        if file.metrics[0] == "judge":
            return {"not_available": why, **counts(rows)}
        others = [metric for metric in file.metrics if metric != "judge"]
        return {**text_figures(others, rows), "judge": {"not_available": why}}
    return text_figures(file.metrics, rows)


KIND = Kind(lambda file: metrics.headline(file.metrics), _row, _figures)
