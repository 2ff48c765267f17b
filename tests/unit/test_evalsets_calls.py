"""Calls of tools by JSON value, and ToolBench's figures of steps worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalsets.ask import said
from evalsets.metrics import calls, toolbench

quick = settings(deadline=None, max_examples=50)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def message(content: str | None, *made: dict[str, Any]) -> str:
    functions = [{"function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for c in made]
    return said({"content": content, "tool_calls": functions}) or ""


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=5)  # fmt: skip
some_calls = st.lists(st.builds(lambda n, a: {"name": n, "arguments": a}, st.text(max_size=5), st.dictionaries(st.text(max_size=3), values, max_size=3)), max_size=3)  # fmt: skip


@quick
@given(st.sampled_from(["", "I call them now.", "two\nlines"]), some_calls)
def test_the_calls_of_a_message_are_found_in_its_text(content: str, made: list[dict[str, Any]]) -> None:
    assert calls.said(message(content, *made)) == made
    assert calls.right_arguments(made[::-1], made) == len(made)


def test_what_a_model_wrote_is_no_call() -> None:
    for text in (
        '{"name": "f", "arguments": {}}',
        '{"arguments":{},"name":"f"}',
        "[]",
        "5",
        "",
        'f(1)\n{"arguments": {}}',
        "[" * 10_000,
    ):
        assert calls.said(text) == []


def test_values_are_those_of_json() -> None:
    assert calls.equal({"a": [1, {"b": None}]}, {"a": [1.0, {"b": None}]})
    for one, other in (
        (1, True),
        (0, False),
        ("1", 1),
        ([1], [1, 2]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, {"b": 1}),
    ):
        assert not calls.equal(one, other)


def test_a_made_call_counts_once() -> None:
    wanted = [call("f", x=1), call("f", x=1), call("g")]
    assert calls.right_arguments([call("g"), call("f", x=1)], wanted) == 2
    assert calls.right_arguments([call("f", x=1)] * 3, wanted) == 2
    assert calls.same_names([call("g"), call("f"), call("f")], wanted)
    assert not calls.same_names([call("g"), call("f")], wanted)


TOOLS = ("add", "now", "Finish")
ADD = 'Thought: x\nAction: add\nAction Input: {"a": 1, "b": 2}'
ANSWER = 'Action: Finish\nAction Input: {"return_type": "give_answer", "final_answer": "it is three"}'
GIVE_UP = 'Action: Finish\nAction Input: {"return_type": "give_up_and_restart"}'


@pytest.mark.parametrize(
    ("reply", "target", "expected"),
    [
        (ADD, ADD, {"act_em": 1, "f1": 1, "hard_f1": 1, "plan_em": 1, "hallu_rate": 0}),
        # a right key with a wrong value counts one half, of two keys said and two wanted: 2 * 1.5 / 4
        ('Action: add\nAction Input: {"a": 1, "b": 5}', ADD, {"act_em": 1, "f1": 0.75, "hard_f1": 0.75, "plan_em": 1, "hallu_rate": 0}),
        ('Action: add\nAction Input: {"a": 1}', ADD, {"act_em": 1, "f1": 2 / 3, "hard_f1": 2 / 3, "plan_em": 1, "hallu_rate": 0}),
        ('Action: add\nAction Input: {"c": 1}', ADD, {"act_em": 1, "f1": 0, "hard_f1": 0, "plan_em": 1, "hallu_rate": 0}),
        ("Action: add\nAction Input: a=1", ADD, {"act_em": 1, "f1": 0, "hard_f1": 0, "plan_em": 1, "hallu_rate": 0}),
        ("Action: now\nAction Input: {}", ADD, {"act_em": 0, "f1": 0, "easy_f1": 0, "hard_f1": 0, "plan_em": 1, "hallu_rate": 0}),
        ("Action: fly\nAction Input: {}", ADD, {"act_em": 0, "f1": 0, "easy_f1": 0, "hard_f1": 0, "plan_em": 1, "hallu_rate": 1}),
        ("I do not know", ADD, {"act_em": 0, "f1": 0, "easy_f1": 0, "hard_f1": 0, "plan_em": 1, "hallu_rate": 0}),
        (GIVE_UP, ADD, {"act_em": 0, "f1": 0, "easy_f1": 0, "hard_f1": 0, "plan_em": 0, "hallu_rate": 0}),
        # the last step of a reply that goes on counts
        (f"{ADD}\nAction: now\nAction Input: {{}}", "Action: now", {"act_em": 1, "f1": 1, "easy_f1": 1, "plan_em": 1, "hallu_rate": 0}),
        ('Action: now\nAction Input: {"x": 1}', "Action: now\nAction Input: {}", {"act_em": 1, "f1": 0, "easy_f1": 0, "plan_em": 1, "hallu_rate": 0}),
        (ANSWER, ANSWER, {"rougeL": 1, "plan_em": 1, "hallu_rate": 0}),
        (ADD, ANSWER, {"rougeL": 0, "plan_em": 0, "hallu_rate": 0}),
        (GIVE_UP, GIVE_UP, {"plan_em": 1, "hallu_rate": 0}),
        ("Action: Finish\nAction Input: nothing", GIVE_UP, {"plan_em": 1, "hallu_rate": 0}),
        # a reference that calls what is not on offer has no right action
        (ADD, "Action: invalid_hallucination_function_name\nAction Input: {}", {"plan_em": 1, "hallu_rate": 0}),
    ],
)  # fmt: skip
def test_steps_of_toolbench(reply: str, target: str, expected: dict[str, float]) -> None:
    found = toolbench.figures("en", reply, target, TOOLS)
    assert {name: value for name, value in found.items() if value is not None} == pytest.approx(expected)


@quick
@given(st.text(max_size=60), st.sampled_from([ADD, ANSWER, GIVE_UP, "Action: now"]))
def test_any_text_is_a_step(reply: str, target: str) -> None:
    found = toolbench.figures("en", reply, target, TOOLS)
    assert all(value is None or 0 <= value <= 1 for value in found.values())
