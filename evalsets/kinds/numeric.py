"""Numeric sets: the number that a reply answers with has the right value."""

from __future__ import annotations

from typing import Any

from evalsets.ask import Reply
from evalsets.extract import narrowed, number, same
from evalsets.kinds.kind import Kind, Replies, Row, judged
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile


def _row(file: SetFile, question: Question, reply: Reply, _: Replies) -> Row:
    found = number(narrowed(file.extract, reply.text))
    right = found is not None and same(found, question.expected)
    return {"expected": question.expected, "parsed": found, "score": float(right)}


def _figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    return judged(rows)


KIND = Kind(lambda _: "acc", _row, _figures)
