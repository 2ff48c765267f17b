"""Sets of tool calls: those that an endpoint's message has, and those that ToolBench writes as text."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from evalsets.ask import Reply
from evalsets.kinds.kind import Kind, Replies, Row, counts, judged, mean
from evalsets.metrics import calls, toolbench
from evalsets.sets.question import Question
from evalsets.sets.settings import SetFile
from evalsets.statistics import mean_interval


def _call_row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    """`name`: the right tools; `arguments`: the share of calls with all of theirs right, where the tools are.

    A question that only says whether to call a tool (EvalScope's general_fc) is answered by any calls that the schemas
    allow.
    """
    made, expected = calls.said(reply.text), question.expected
    valid = fmean(calls.valid(call, question.tools) for call in made) if made else None
    row: Row = {"expected": expected, "parsed": made, "name": None, "arguments": None, "valid": valid}
    if reply.error:
        return row | {"name": 0.0, "score": 0.0}
    if isinstance(expected, bool):
        return row | {"name": float(bool(made) == expected), "score": float(valid == 1 if expected else not made)}
    row["name"] = float(calls.same_names(made, expected))
    right = calls.right_arguments(made, expected)
    if row["name"] and expected:
        row["arguments"] = right / len(expected)
    return row | {"score": float(len(made) == len(expected) == right)}


def _call_figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    """`acc`: the right calls and no others; `no_call` is that of questions that need none, `valid` a share of calls.

    `tool_call_f1` of whether a tool is called, over the questions that need one, and `schema_accuracy`, the share of
    replies with calls all of which their schemas allow, are EvalScope's, 0 where nothing is called.
    """
    silent, called = [r for r in rows if not r["expected"]], [r for r in rows if r["parsed"]]
    shares = {name: mean(rows, name) for name in ("name", "arguments", "valid")}
    rightly = sum(bool(r["expected"]) for r in called)
    return (
        judged(rows)
        | shares
        | {
            "no_call": mean(silent, "score"),
            "tool_call_f1": 2 * rightly / max(len(called) + len(rows) - len(silent), 1),
            "schema_accuracy": sum(r["valid"] == 1 for r in called) / max(len(called), 1),
        }
    )


CALLS = Kind(lambda _: "acc", _call_row, _call_figures)


def _step_row(_: SetFile, question: Question, reply: Reply, __: Replies) -> Row:
    """What ToolBench measures of a step; `score` is F1 of a call, ROUGE-L of an answer, else whether the plan fits."""
    target, offered = question.expected["target"], question.expected["tools"]
    found = toolbench.figures(question.language, reply.text, target, offered)
    if reply.error:
        found = {name: None if value is None else 0.0 for name, value in found.items()}
    score = next(v for name in ("f1", "rougeL", "plan_em") if (v := found[name]) is not None)
    return {"expected": target, **found, "score": score}


def _step_figures(_: SetFile, rows: list[Row]) -> dict[str, Any]:
    low, high = mean_interval([r["score"] for r in rows])
    step = fmean(r["score"] for r in rows)
    return {"step": step, "low": low, "high": high, **counts(rows)} | {
        name: mean(rows, name) for name in toolbench.FIGURES
    }


STEPS = Kind(lambda _: "step", _step_row, _step_figures)
