"""What all kinds share: the form of a kind, counts, accuracy with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evalsets.ask import Reply
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import wilson

Row = dict[str, Any]
Replies = Mapping[str, Reply]


@dataclass(frozen=True)
class Kind:
    """One kind of set.

    `headline` is the figure that stands for it, has the interval and decides comparisons. `row` says of a question what
    was `expected`, what was `parsed` where an answer is read out of the reply, and the `score` from 0 to 1; it gets
    the reply to the question, and all replies for what else was asked of it. `figures` are those of some rows.
    """

    headline: Callable[[SetFile], str]
    row: Callable[[SetFile, Question, Reply, Replies], Row]
    figures: Callable[[SetFile, list[Row]], dict[str, Any]]


def counts(rows: list[Row]) -> dict[str, int]:
    """Questions, those that failed, and replies that were cut off."""
    return {
        "n": len(rows),
        "failed": sum(bool(r["error"]) for r in rows),
        "truncated": sum(r["finish"] == "length" for r in rows),
    }


def accuracy(rows: list[Row], score: str = "score") -> dict[str, Any]:
    """The share of rows that are right, with its interval; a failed question is wrong."""
    right = sum(r[score] == 1 for r in rows)
    low, high = wilson(right, len(rows))
    return {"acc": right / len(rows), "low": low, "high": high}


def judged(rows: list[Row]) -> dict[str, Any]:
    """Accuracy, counts, and the replies in which no answer was found."""
    unparsed = sum(r["parsed"] is None and not r["error"] for r in rows)
    return {**accuracy(rows), **counts(rows), "unparsed": unparsed}


def mean(rows: list[Row], name: str) -> float | None:
    """The mean of a figure over the rows that have it; None where none has."""
    values = [r[name] for r in rows if r[name] is not None]
    return sum(values) / len(values) if values else None
