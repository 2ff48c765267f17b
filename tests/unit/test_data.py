"""Reading chat data: every row is used or accounted for, and every broken file is an answer, not a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suite import data
from suite.errors import SuiteError
from suite.turns import ROLES

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Who are you?"}
ASSISTANT = {"role": "assistant", "content": "A model."}
CALL = {"type": "function", "function": {"name": "time", "arguments": {"city": "Paris"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "noon"}


def write(folder: Path, *rows: Any, name: str = "rows.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return file


def only(folder: Path, row: Any) -> data.Conversation:
    rows = data.read(write(folder, row))
    assert not rows.left_out, rows.left_out
    return rows.conversations[0]


def reason(folder: Path, row: Any) -> str:
    rows = data.read(write(folder, row))
    assert not rows.conversations
    return rows.left_out[0].reason


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Who are you?", "input": "", "output": "A model."}, [USER, ASSISTANT]),
        (
            {"instruction": "Who are", "input": "you?", "output": "A model."},
            [{**USER, "content": "Who are\nyou?"}, ASSISTANT],
        ),
        ({"system": "Be brief.", "instruction": "Who are you?", "output": "A model."}, [SYSTEM, USER, ASSISTANT]),
        (
            {"instruction": "Who are you?", "output": "A model.", "history": [["Who are you?", "A model."]]},
            [USER, ASSISTANT, USER, ASSISTANT],
        ),
        (
            {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A model."}]},
            [USER, ASSISTANT],
        ),
        (
            {"conversation": [{"system": "Be brief.", "input": "Who are you?", "output": "A model."}]},
            [SYSTEM, USER, ASSISTANT],
        ),
        ({"messages": [SYSTEM, USER, ASSISTANT], "system": "overridden by the message"}, [SYSTEM, USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "system": "Be brief."}, [SYSTEM, USER, ASSISTANT]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}, ASSISTANT]},
            [USER, ASSISTANT],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Who are you?"},
                    {"from": "function_call", "value": '{"name": "time", "arguments": {"city": "Paris"}}'},
                    {"from": "observation", "value": "noon"},
                    {"from": "gpt", "value": "A model."},
                ]
            },
            [USER, CALLED, RESULT, ASSISTANT],
        ),
    ],
)
def test_each_format_gives_the_same_messages(tmp_path: Path, row: Any, messages: list[Any]) -> None:
    assert only(tmp_path, row).messages == messages


def test_parallel_calls_are_one_turn(tmp_path: Path) -> None:
    call = {"role": "tool_call", "content": '{"name": "time", "arguments": {"city": "Paris"}}'}
    row = {"messages": [USER, {"role": "assistant", "content": "Let me see."}, call, call, RESULT, RESULT, ASSISTANT]}
    turn = only(tmp_path, row).messages[1]
    assert turn == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: {"type": "function", "function": f}])
@pytest.mark.parametrize("dump", [lambda t: t, json.dumps])
def test_tools_in_every_spelling(tmp_path: Path, wrap: Any, dump: Any) -> None:
    function = {"name": "time", "parameters": {"type": "object"}}
    row = {"messages": [USER, ASSISTANT], "tools": dump([wrap(function)])}
    assert only(tmp_path, row).tools == [{"type": "function", "function": function}]
    assert only(tmp_path, {**row, "tools": ""}).tools is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("text", "not an object"),
        ({"text": "plain"}, "unknown format, keys: text"),
        ({"instruction": "Hi"}, "no answer"),
        ({"instruction": "", "output": "x"}, "no instruction"),
        ({"instruction": 3, "output": "x"}, "expected text, got int"),
        ({"messages": []}, "no messages"),
        ({"messages": [USER]}, "ends with a user message"),
        ({"messages": [USER, USER, ASSISTANT]}, "message 2 (user) follows user"),
        ({"messages": [ASSISTANT]}, "message 1 (assistant) follows nothing"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "message 2 (system) follows user"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no answer"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "weight"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]}, "only text content"),
        ({"messages": [USER, {"role": "tool_call", "content": "{"}]}, "not valid JSON"),
        ({"messages": [USER, {"role": "tool_call", "content": "{}"}]}, "has no name"),
        ({"messages": [USER, ASSISTANT], "tools": "{}"}, "tools: expected a list"),
        ({"messages": [USER, ASSISTANT], "label": True}, "preference row (has 'label')"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference row (has 'chosen')"),
        ({"instruction": "x", "output": "y", "history": ["z"]}, "'history' is no list"),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(tmp_path: Path, row: Any, expected: str) -> None:
    assert expected in reason(tmp_path, row)


def test_rows_know_their_lines_in_lists_and_in_lines(tmp_path: Path) -> None:
    good = {"instruction": "a\nb", "output": "c"}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([good, {"x": 1}, good], indent=2), "utf-8")
    assert [c.line for c in data.read(listed).conversations] == [2, 9]
    assert [str(row) for row in data.read(listed).left_out] == [f"{listed}:6: unknown format, keys: x"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join([json.dumps(good), "", '{"x": 1}', json.dumps(good)]), "utf-8")
    assert [c.line for c in data.read(lines).conversations] == [1, 4]
    assert data.read(lines).account() == "1 of 3 rows left out: 1 unknown format, keys: x (lines.jsonl:3)"


@pytest.mark.parametrize(
    ("text", "where", "message", "hint"),
    [
        # the sample in XTuner's documentation that people paste
        (
            '[{\n  "conversation":[\n    {\n      "system": "You are an AI asssistant."\n      "input": "xxx",\n'
            '      "output": "xxx"\n    }\n  ]\n}]',
            ":5:7",
            "expected ',' or a closing bracket before '\"input\": \"xxx\",'",
            'line 4 ends without a comma:       "system": "You are an AI asssistant."',
        ),
        ('[\n{"a": 1}\n{"a": 2}\n]', ":3:1", "expected ','", 'line 2 ends without a comma: {"a": 1}'),
        ("[{'a': 1}]", ":1:3", "expected a key in double quotes", "JSON wants double quotes"),
        ('[{"a": 1}', ":1:10", "at the end of the file", ""),
        ('{"a": 1}\n{"a": 2', ":2:8", "at the end of the file", ""),
        ('{"a": 1}\n{"a": 2} {"b": 3}', ":2:10", "expected nothing more before '{\"b\": 3}'", "one row a line"),
        ('{\n "a": 1\n}', ":1:2", "expected a key in double quotes at the end of the line", "one row a line"),
        ('[{"a": "x\ny"}]', ":1:10", "a string goes over the end of its line", r"\n"),
        ('[{"a": "x}]', ":1:8", "no closing quote", ""),
        ("[1, ]x", ":1:6", "expected nothing more before 'x'", ""),
        ("[{'a'", ":1:3", "expected a key", ""),
        ('[{"a" 1}]', ":1:7", "expected ':' after the key", ""),
        ('[{"a": tru}]', ":1:8", "expected a value", ""),
    ],
)
def test_malformed_json_says_line_column_and_what_was_expected(
    tmp_path: Path, text: str, where: str, message: str, hint: str
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text, "utf-8")
    with pytest.raises(SuiteError) as error:
        data.read(file)
    assert error.value.where == f"{file}{where}"
    assert message in error.value.message
    assert hint in error.value.hint


def test_unreadable_files_say_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, {"instruction": "a", "output": "b"}, name="chat.json")
    with pytest.raises(SuiteError, match=r"no such data file[\s\S]*did you mean 'chat.json'"):
        data.read(tmp_path / "chatt.json")
    with pytest.raises(SuiteError, match=r"is a directory[\s\S]*chat\.json"):
        data.read(tmp_path)
    (tmp_path / "empty.jsonl").write_text(" \n", "utf-8")
    with pytest.raises(SuiteError, match="the file is empty"):
        data.read(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "x"}\n{"a": "\xe9"}')
    with pytest.raises(SuiteError, match=r"latin\.jsonl:2: not UTF-8"):
        data.read(tmp_path / "latin.jsonl")


def test_placeholders_are_filled_everywhere(tmp_path: Path) -> None:
    file = write(tmp_path, {"instruction": "Hi {{name}}", "output": "I am {{name}} by {{author}}, {{ not one }}"})
    rows = data.read(file, {"name": "Nano", "author": "Ann"})
    assert [m["content"] for m in rows.conversations[0].messages] == ["Hi Nano", "I am Nano by Ann, {{ not one }}"]
    assert rows.placeholders == {"name": 2, "author": 1}


def test_check_finds_what_a_plan_must_not_pass(tmp_path: Path) -> None:
    file = write(tmp_path, {"instruction": "Hi", "output": "I am {{name}}"})
    with pytest.raises(SuiteError, match=r"no value for \{\{name\}\} \(1 times\)[\s\S]*fill = \{ name ="):
        data.check([file])
    with pytest.raises(SuiteError, match=r"fill\.nmae[\s\S]*did you mean 'name'"):
        data.check([file], {"name": "x", "nmae": "y"})
    data.check([file], {"name": "{{name}}"})
    useless = write(tmp_path, {"text": "x"}, name="useless.json")
    with pytest.raises(SuiteError, match=r"no row can be used[\s\S]*a row is"):
        data.check([useless])
    with pytest.raises(SuiteError, match="no such data file"):
        data.check([file, tmp_path / "missing.json"], {"name": "x"})


texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(["role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.from_regex(
    r"instruction|input|output|history|system|messages|conversations?|role|content|tools", fullmatch=True
)
turns = st.fixed_dictionaries({"role": st.sampled_from([*ROLES, "x"]), "content": texts | values})
rows = (
    values
    | st.dictionaries(keys, values, max_size=5)
    | st.fixed_dictionaries({"messages": st.lists(turns, max_size=5)})
)


@settings(max_examples=120)
@given(st.lists(rows, min_size=1, max_size=4), st.sampled_from([None, 2]), st.booleans())
def test_every_row_is_used_or_accounted_for(
    tmp_path_factory: Any, content: list[Any], indent: int | None, lines: bool
) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    lines = lines and not isinstance(content[0], list)
    file.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content, indent=indent), "utf-8")
    read = data.read(file)
    assert len(read.conversations) + len(read.left_out) == len(content)
    for conversation in read.conversations:
        assert conversation.messages[-1]["role"] == "assistant"
        assert all(isinstance(message["content"], str) for message in conversation.messages)
    at = [row.line for row in (*read.conversations, *read.left_out)]
    assert all(1 <= line <= len(file.read_text("utf-8").split("\n")) for line in at)


@settings(max_examples=100)
@given(st.text(alphabet="[]{},:\"\\ \n'ax1\u4f60", max_size=30))
def test_any_text_is_read_or_refused_with_a_place(tmp_path_factory: Any, text: str) -> None:
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(text, "utf-8", newline="")
    place = str(file)
    try:
        data.read(file)
    except SuiteError as refused:
        place = refused.where
    assert place.startswith(str(file))
