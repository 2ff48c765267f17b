"""Predictions row by row: none is lost, none is asked twice, and none of another model, setting or prompt is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_fake import Say, serve

from evalsets.ask import Client
from evalsets.predictions import Predictions, Row, predict
from suite import data
from suite.cli import main
from suite.errors import SuiteError

WEATHER = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "the cat sat"}]},
    {"instruction": "two", "input": "more", "output": "on the mat", "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "三"}, {"from": "gpt", "value": "the sun"}]},
    {
        "messages": [
            {"role": "user", "content": "four"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ],
        "tools": [WEATHER],
    },
]
ANSWERS = {"one": "the cat sat", "two\nmore": "on a mat", "三": "the sun"}


def rule(body: dict[str, Any]) -> Say | dict[str, Any]:
    question = next(m["content"] for m in body["messages"] if m["role"] == "user")
    if question != "four":
        return Say(ANSWERS.get(question, "?"))
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": {"completion_tokens": 7}}


def rows(folder: Path, given: list[dict[str, Any]] = ROWS) -> list[Row]:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in given), "utf-8")
    return [Row.of(index, found) for index, found in enumerate(data.read(path).conversations)]


def run(url: str, folder: Path, given: list[Row], model: str = "m1", **body: Any) -> tuple[list[Any], dict[str, Any]]:
    file = Predictions(folder / "out.jsonl", given, {"model": model}, {"model": "m", **body})
    found = predict(Client(url, concurrency=2, pause=0.001, attempts=2, timeout=10), file)
    return [json.loads(line) for line in (folder / "out.jsonl").read_text("utf-8").splitlines()], found


def test_each_row_is_asked_once_and_compared(tmp_path: Path) -> None:
    given = rows(tmp_path)
    with serve(rule) as fake:
        lines, found = run(fake.url, tmp_path, given, max_tokens=9)
        sent = {body["messages"][-1]["content"]: body for body in fake.asked}
        again, unasked = run(fake.url, tmp_path, given, max_tokens=9)
        assert (len(fake.asked), unasked["speed"], again) == (4, {}, lines)
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two\nmore"},
    ]
    assert (lines[1]["predict"], lines[1]["label"], lines[1]["tokens"]) == ("on a mat", "on the mat", 3)
    assert lines[3]["predict"] == lines[3]["label"] == '{"arguments": {"city": "Rome"}, "name": "weather"}'
    assert sent["sun"]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Rome"}'
    assert sent["sun"]["tools"] == [WEATHER]
    assert all(body["max_tokens"] == 9 for body in sent.values())
    assert {k: found["metrics"][k] for k in ("n", "failed", "exact")} == {"n": 4, "failed": 0, "exact": 0.75}
    assert json.loads((tmp_path / "out.metrics.json").read_text("utf-8"))["metrics"] == found["metrics"]


def test_a_killed_run_asks_for_the_rest_only(tmp_path: Path) -> None:
    given = rows(tmp_path)
    with serve(rule) as fake:
        lines, _ = run(fake.url, tmp_path, given)
        for kept in range(4):
            for torn in ("", json.dumps(lines[kept])[:-30]):
                fake.asked.clear()
                (tmp_path / "out.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:kept]) + torn, "utf-8")
                again, _ = run(fake.url, tmp_path, given)
                assert len(fake.asked) == 4 - kept
                assert [line | {"latency": 0} for line in again] == [line | {"latency": 0} for line in lines]


def test_a_failed_row_is_counted_and_asked_again(tmp_path: Path) -> None:
    given = rows(tmp_path)
    with serve(lambda body: Say(status=400) if "one" in str(body) else rule(body)) as fake:
        lines, found = run(fake.url, tmp_path, given)
    assert lines[0]["error"] == "HTTP 400: (empty)"
    assert found["metrics"]["failed"] == 1
    assert found["metrics"]["exact"] == 0.5
    with serve(rule) as fake:
        lines, found = run(fake.url, tmp_path, given)
        assert [body["messages"][0]["content"] for body in fake.asked] == ["one"]
    assert (lines[0]["error"], found["metrics"]["failed"]) == ("", 0)


def test_rows_that_changed_are_asked_again(tmp_path: Path) -> None:
    with serve(rule) as fake:
        run(fake.url, tmp_path, rows(tmp_path))
        fake.asked.clear()
        changed = [ROWS[2], {"instruction": "new", "output": "x"}, {**ROWS[0], "id": 1}]
        lines, _ = run(fake.url, tmp_path, rows(tmp_path, changed))
        assert len(fake.asked) == 1
    assert [(line["index"], line["predict"]) for line in lines] == [(0, "the sun"), (1, "?"), (2, "the cat sat")]


def test_predictions_of_another_run_are_neither_used_nor_lost(tmp_path: Path) -> None:
    given = rows(tmp_path)
    with serve(rule) as fake:
        lines, _ = run(fake.url, tmp_path, given)
        for other in ({"model": "m2"}, {"temperature": 0.5}):
            with pytest.raises(SuiteError, match="another model, or with other settings"):
                run(fake.url, tmp_path, given, **other)
        assert len(fake.asked) == 4
    assert [json.loads(x) for x in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == lines


@pytest.mark.parametrize("content", ['{"messages": []}\n', "notes\n", "[1]\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.jsonl").write_text(content, "utf-8")
    with pytest.raises(SuiteError, match="holds other things"):
        run("http://127.0.0.1:9", tmp_path, rows(tmp_path))
    assert (tmp_path / "out.jsonl").read_text("utf-8") == content


def test_rows_of_another_model_behind_the_same_address_are_neither_used_nor_lost(tmp_path: Path) -> None:
    rows(tmp_path)
    out = tmp_path / "out.jsonl"
    port = 0
    for card, fails, code, asked in (("a", "one", 1, 4), ("b", "", 2, 0), ("a", "", 0, 1)):
        with serve(
            lambda body, fails=fails: Say(status=400) if fails and fails in str(body) else rule(body),  # type: ignore[misc]
            card={"root": card, "created": 7},
            port=port,
        ) as fake:
            port = int(fake.url.rpartition(":")[2])
            command = ["predict", str(tmp_path / "data.jsonl"), "--out", str(out), "--url", fake.url, "--model", "m"]
            assert (main(command), len(fake.asked)) == (code, asked)
        assert len(out.read_text("utf-8").splitlines()) == 4
