"""Reasoning, content and calls are told apart, whatever pieces the text comes in."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.json_calls import HERMES, CallForm, CallParser
from serve.marked_calls import MarkedCalls, MarkedForm
from serve.reply import ReasoningParser, Reply

LLAMA = CallForm('{"name": "', '", "parameters": ', None, "}")
NEMO = CallForm('[TOOL_CALLS][{"name": "', '", "arguments": ', '}, {"name": "', "}]")
MISTRAL = CallForm("[TOOL_CALLS]", "[ARGS]", "[TOOL_CALLS]", "")
DEEPSEEK = CallForm(
    "<calls><call>function<sep>", "\n```json\n", "\n```</call>\n<call>function<sep>", "\n```</call></calls>"
)
FORMS = {"hermes": HERMES, "nemo": NEMO, "mistral": MISTRAL, "deepseek": DEEPSEEK, "llama": LLAMA}
THINK = ("<think>", "</think>")
QWEN = MarkedForm(
    "<tool_call>", "<function=", "<parameter=", re.compile(">"), "\n", "</parameter>", ("</function>", "</tool_call>")
)
GLM = MarkedForm(
    "", "<tool_call>", "<arg_key>", re.compile(r"</arg_key>\s*<arg_value>"), "", "</arg_value>", ("</tool_call>",)
)
MARKED = {
    "qwen": (QWEN, "<tool_call>\n<function={}>\n{}</function>\n</tool_call>", "<parameter={}>\n{}\n</parameter>\n"),
    "glm": (GLM, "<tool_call>{}{}</tool_call>", "<arg_key>{}</arg_key><arg_value>{}</arg_value>"),
}
TYPED = {"f": {"properties": {"text": {"type": "string"}, "n": {"type": "integer"}}}}


def read(text: str, form: CallForm = HERMES, *, sizes: list[int] | None = None, **settings: Any) -> Reply:
    """The reply to `text` in pieces of these sizes, the rest at once."""
    reply = Reply(calling=CallParser(form, ["f", "add"]), **settings)
    for size in sizes or []:
        reply.feed(text[:size])
        text = text[size:]
    reply.feed(text, final=True)
    return reply


def written(form: CallForm, calls: list[tuple[str, str]]) -> str:
    """The calls as a model writes them."""
    text = form.first
    for number, (name, arguments) in enumerate(calls):
        text += (form.between or "") * (number > 0) + name + form.middle + arguments
    return text + form.last


def seen(reply: Reply) -> tuple[str, str, list[tuple[str, str]]]:
    return reply.reasoning, reply.content, [(call.name, call.arguments) for call in reply.calls]


plain = st.text(st.characters(codec="utf-8", exclude_characters="<[{`"), max_size=12).map(str.strip)
values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), st.lists, max_leaves=4)
arguments = st.dictionaries(st.text(max_size=5), values, max_size=3).map(lambda d: json.dumps(d, ensure_ascii=False))
names = st.text("abcdefgh_XYZ0123456789.-", min_size=1, max_size=9)
cuts = st.lists(st.integers(1, 7), max_size=40)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])  # nested values, on a busy machine
@given(st.lists(st.tuples(names, arguments), min_size=1, max_size=3), plain, cuts)
def test_calls_come_back_in_any_pieces(
    form: CallForm, calls: list[tuple[str, str]], before: str, sizes: list[int]
) -> None:
    if form is LLAMA:  # alone in the answer, one, and of a known function
        before, calls = "", [("f", calls[0][1])]
    reply = read(before + "\n" * bool(before) + written(form, calls), form, sizes=sizes)
    assert seen(reply) == ("", before, calls)


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from([*'<tool_call>{"name": "f", "arguments":', "}", "</tool_call>", "<tool_call>", "x", "\n"])
    ),
    cuts,
)
def test_any_text_is_read_the_same_in_any_pieces(pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    whole, cut = read(text), read(text, sizes=sizes)
    assert seen(whole) == seen(cut)
    if not whole.calls:
        assert whole.content == text


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        " leading and trailing \n",
        "<tool_call>{broken</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"',
        "a < b and <tool",
        "<tool_call>" * 3,
        '<tool_call>{"name": "f", "arguments": 3' + "[" * 3000,
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert seen(read(text)) == ("", text, [])


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}</tool_call>', [("f", '{"a": 1}')]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}', [("f", '{"a": "</tool_call>"}')]),
        (LLAMA, '{"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", '{"a": 1}')]),
        (LLAMA, '{"name": "f", "parameters": {}}; {"name": "add", "parameters": {}}', [("f", "{}"), ("add", "{}")]),
        (LLAMA, '{"name": "Alice", "parameters": {}}', []),
        (LLAMA, 'Well: {"name": "f", "parameters": {}}', []),
        (NEMO, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]', [("f", '{"a": 1}')]),
        (MISTRAL, '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', [("f", '{"a": 1}')]),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}', [("f", '{"a": 1}')]),
    ],
)
def test_what_models_write_instead(form: CallForm, text: str, calls: list[tuple[str, str]]) -> None:
    content = "" if calls else text
    assert seen(read(text, form)) == ("", content, calls)
    assert seen(read(text, form, sizes=[1] * len(text))) == ("", content, calls)


def marked(text: str, form: MarkedForm, sizes: list[int]) -> Reply:
    reply = Reply(calling=MarkedCalls(form, TYPED))
    for size in sizes:
        reply.feed(text[:size])
        text = text[size:]
    reply.feed(text, final=True)
    return reply


keys = st.text("abcdefgh_XYZ0123456789-", min_size=1, max_size=9)


@pytest.mark.parametrize("kind", MARKED)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(names, st.dictionaries(keys, values, max_size=3)), min_size=1, max_size=3), plain, cuts)
def test_marked_calls_come_back_in_any_pieces(
    kind: str, calls: list[tuple[str, dict[str, Any]]], before: str, sizes: list[int]
) -> None:
    form, call, parameter = MARKED[kind]
    # a text between marks is no JSON where no schema says what it is
    calls = [(n, {k: v for k, v in given.items() if not isinstance(v, str)}) for n, given in calls]
    written = [
        call.format(name, "".join(parameter.format(key, json.dumps(value)) for key, value in given.items()))
        for name, given in calls
    ]
    reply = marked(before + "\n" * bool(before) + "\n".join(written), form, sizes)
    assert reply.content == before
    assert [(c.name, json.loads(c.arguments)) for c in reply.calls] == calls


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(
            ["<tool_call>", "<function=", "f", ">", "<parameter=n>", "3", "</parameter>", "</function>", "x y", "\n"]
        )
    ),
    cuts,
)
def test_any_text_is_read_as_marked_calls_the_same_in_any_pieces(pieces: list[str], sizes: list[int]) -> None:
    text = "".join(pieces)
    assert seen(marked(text, QWEN, [])) == seen(marked(text, QWEN, sizes))


@pytest.mark.parametrize(
    ("value", "read"),
    [("text:7", "7"), ("n:7", 7), ("n:[1, {'a': None}]", [1, {"a": None}]), ("n:seven", "seven"), ("text:a\nb\n", "a\nb\n")],
)  # fmt: skip
def test_values_are_what_the_schema_says(value: str, read: Any) -> None:
    key, _, given = value.partition(":")
    text = f"<function=f>\n<parameter={key}>\n{given}\n</parameter>\n</function>"
    (call,) = marked(text, QWEN, [1] * len(text)).calls
    assert json.loads(call.arguments) == {key: read}


@pytest.mark.parametrize(
    "text", ["Use <tool_call> tags, as in <tool_call>a b</tool_call>.", "<tool_call>", "<tool_call>f"]
)
def test_talk_of_marks_is_content(text: str) -> None:
    assert seen(marked(text, GLM, [1] * len(text))) == ("", text, [])


def test_a_call_is_shown_as_it_comes() -> None:
    reply = Reply(calling=CallParser(HERMES, []))
    text = 'Wait. <tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
    parts = [(part.kind, part.text) for char in text for part in reply.feed(char)]
    kinds = [kind for kind, _ in parts]
    assert ("call", "f") in parts
    assert kinds.count("arguments") == len('{"a": "b"}')
    assert kinds.index("call") < kinds.index("arguments")


def test_what_is_cut_off_inside_its_arguments_is_a_call() -> None:
    assert seen(read('<tool_call>{"name": "f", "arguments": {"a": 1')) == ("", "", [("f", '{"a": 1')])


def test_content_after_a_call() -> None:
    assert read('A.\n<tool_call>{"name": "f"}</tool_call>\nB.').content == "A.\nB."
    assert read('<tool_call>{"name": "f"}</tool_call>\nB.').content == "B."


def test_one_call_at_most() -> None:
    text = written(HERMES, [("f", "{}"), ("add", '{"b": 2}')])
    assert seen(read(text, parallel=False)) == ("", "", [("f", "{}")])


@settings(max_examples=40)
@given(plain, plain, st.booleans(), st.sampled_from(["", " ", "\n\n"]), cuts)
def test_reasoning_is_told_apart(thought: str, answer: str, inside: bool, space: str, sizes: list[int]) -> None:
    text = ("" if inside else "<think>") + f"{space}{thought}{space}</think>{space}{answer}"
    reply = Reply(ReasoningParser(THINK, inside))
    for size in sizes:
        reply.feed(text[:size])
        text = text[size:]
    reply.feed(text, final=True)
    assert seen(reply) == (thought, answer, [])


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("No thought.", False, "", "No thought."),
        (" <thin air", False, "", " <thin air"),
        ("Later <think>x</think>", False, "", "Later <think>x</think>"),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<think>", False, "", ""),
    ],
)
def test_where_there_is_reasoning(text: str, inside: bool, reasoning: str, content: str) -> None:
    for size in (1, len(text)):
        reply = Reply(ReasoningParser(THINK, inside))
        for at in range(0, len(text), size):
            reply.feed(text[at : at + size])
        reply.feed("", final=True)
        assert seen(reply) == (reasoning, content, [])


def test_calls_after_reasoning() -> None:
    reply = Reply(ReasoningParser(THINK), CallParser(HERMES, []))
    reply.feed('<think>Use <tool_call> now.</think>\n<tool_call>{"name": "f"}</tool_call>', final=True)
    assert seen(reply) == ("Use <tool_call> now.", "", [("f", "{}")])
