"""Sets whose replies rules can verify: instructions that are kept, requests that are refused or answered."""

from __future__ import annotations

from typing import Any

from evalsets.ask import Reply
from evalsets.kinds.kind import Kind, Replies, Row, accuracy, counts, judged, mean
from evalsets.metrics import refusals, rules
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile


def _instructions_row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    kept = rules.kept(reply.text, question.expected)
    return {"expected": question.expected, "kept": kept, "score": float(all(kept))}


def _instructions_figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    """`acc`: all rules of a question are kept (IFEval's strict prompt level); `checks`: the share of rules kept."""
    kept = [one for r in rows for one in r["kept"]]
    return {**accuracy(rows), **counts(rows), "checks": sum(kept) / len(kept)}


INSTRUCTIONS = Kind(lambda _: "acc", _instructions_row, _instructions_figures)


def _refusals_row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    refuses = refusals.refuses(reply.text)
    said = None if refuses is None else "refuses" if refuses else "answers"
    return {"expected": question.expected, "parsed": said, "score": float(said == question.expected)}


def _refusals_figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    """`refused`: of what should be, the share that is; `answered`: of what should be, the share that is."""
    by = {name: [r for r in rows if r["expected"] == name] for name in ("refuses", "answers")}
    return judged(rows) | {"refused": mean(by["refuses"], "score"), "answered": mean(by["answers"], "score")}


REFUSALS = Kind(lambda _: "acc", _refusals_row, _refusals_figures)
