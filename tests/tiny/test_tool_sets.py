"""Whole sets of tool calls: what is right, what is half right, and what no schema allows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsets import sets
from evalsets.ask import Reply, said
from evalsets.kinds import tools
from evalsets.metrics import calls
from evalsets.score import requests, score


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def message(content: str | None, *made: dict[str, Any]) -> str:
    functions = [{"function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for c in made]
    return said({"content": content, "tool_calls": functions}) or ""


def test_a_call_is_checked_by_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {"hour": {"type": "integer"}},
        "required": ["hour"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "alarm", "parameters": schema}}]
    assert calls.valid(call("alarm", hour=5), tools)
    for wrong in (
        call("alarm"),
        call("alarm", hour="5"),
        call("alarm", hour=5, day=1),
        call("clock", hour=5),
        {"name": "alarm", "arguments": "{"},
    ):
        assert not calls.valid(wrong, tools)
    assert calls.valid(call("now"), [{"function": {"name": "now"}}])


def test_the_shipped_set_is_scored_by_value() -> None:
    """Of 80: one call each is right but one with a wrong value and one of a wrong tool, two at once miss one, and one of those that need none is called."""
    asked = sets.load("tool-calls")
    questions = asked.questions()
    replies = {q.id: Reply(q.id, "", message("", *q.expected), "tool_calls") for q in questions}
    one, two, none = ([q for q in questions if q.subset == name] for name in ("one", "two", "none"))
    (wanted,) = one[0].expected
    replies[one[0].id] = Reply("", "", message("", {**wanted, "arguments": dict.fromkeys(wanted["arguments"], "x")}))
    replies[one[1].id] = Reply("", "", message("", call("fly", to="the moon")))
    replies[one[2].id] = Reply("", "", json.dumps(one[2].expected[0]))  # written, not called
    replies[one[3].id] = Reply("", "", error="HTTP 500")
    replies[two[0].id] = Reply("", "", message("", two[0].expected[1]))
    replies[none[0].id] = Reply("", "", message("", one[4].expected[0]))
    found = score(asked, questions, replies)
    assert found.total["acc"] == 74 / 80
    assert (found.total["n"], found.total["failed"], found.total["unparsed"]) == (80, 1, 0)
    assert found.total["name"] == 75 / 80
    assert found.total["arguments"] == pytest.approx(55 / 56)
    assert found.total["no_call"] == 19 / 20
    assert found.subsets["two"]["acc"] == 19 / 20
    (request,) = requests(asked, one[0], "m")
    assert request.body["tools"] == list(one[0].tools)


def test_questions_that_only_ask_whether_to_call(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    row = {"query": "q", "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]}
    rows = [{**row, "should_call_tool": should} for should in (True, True, True, False, False)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    asked = sets.load(str(tmp_path))
    questions = asked.questions()
    texts = [message("", call("f", x=1)), message("", call("f", x="1")), "no", "no", message("", call("f", x=1))]
    replies = {q.id: Reply(q.id, "", text) for q, text in zip(questions, texts, strict=True)}
    found = score(asked, questions, replies)
    assert [row["score"] for row in found.rows] == [1, 0, 0, 1, 0]
    assert (found.total["acc"], found.total["name"], found.total["no_call"]) == (2 / 5, 3 / 5, 1 / 2)
    assert found.total["valid"] == pytest.approx(2 / 3)
    # two of three that are called should be, and one that should be is not
    assert found.total["tool_call_f1"] == pytest.approx(2 / 3)
    assert found.total["schema_accuracy"] == pytest.approx(2 / 3)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "right", "wrong"])), min_size=1, max_size=12))
def test_figures_of_calling_are_those_of_a_confusion_matrix(asked: list[tuple[bool, str]]) -> None:
    """Precision and recall as EvalScope's general_fc defines them."""
    rows = [
        {"expected": should, "parsed": [made] * bool(made), "valid": float(made == "right") if made else None, "score": 0.0,
         "name": 0.0, "arguments": None, "error": "", "finish": ""}
        for should, made in asked
    ]  # fmt: skip
    found = tools.CALLS.figures(sets.load("tool-calls").file, rows)
    both = sum(should and bool(made) for should, made in asked)
    precision = both / called if (called := sum(bool(made) for _, made in asked)) else 0.0
    recall = both / wanted if (wanted := sum(should for should, _ in asked)) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert found["tool_call_f1"] == pytest.approx(f1)
    assert found["schema_accuracy"] == (sum(made == "right" for _, made in asked) / called if called else 0.0)
