"""The model that comes with the suite, served: it says who it is, and calls tools in OpenAI's form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import openai

from suite.references import nano
from tests.contract.suite_server import suite_serve

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASK: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]


def ask(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    return client.chat.completions.create(model="nano", messages=messages, temperature=0, max_tokens=80, **more)


def test_identity(client: openai.OpenAI) -> None:
    got = ask(client, [{"role": "user", "content": "Who are you?"}]).choices[0]
    assert "nano" in got.message.content
    assert got.finish_reason == "stop"


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    got = ask(client, ASK, tools=[WEATHER]).choices[0]
    assert got.finish_reason == "tool_calls"
    (call,) = got.message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert list(json.loads(call.function.arguments)) == ["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    after = ask(client, [*ASK, got.message, result], tools=[WEATHER]).choices[0]
    assert after.finish_reason == "stop"
    assert after.message.content


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    (call,) = ask(client, ASK, tools=[WEATHER]).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in ask(client, ASK, tools=[WEATHER], stream=True)]
    first, *more = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert (first.index, first.type, first.function.name) == (0, "function", call.function.name)
    assert first.id
    assert len(more) > 1
    assert all(delta.index == 0 and delta.id is None and delta.function.name is None for delta in more)
    assert "".join(delta.function.arguments for delta in [first, *more]) == call.function.arguments
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]


def test_an_answer_ends_with_its_turn_where_settings_name_the_end_of_a_text_alone(tmp_path: Path) -> None:
    model = tmp_path / "bare"
    shutil.copytree(nano(), model)
    for file, said in (("generation_config.json", {"eos_token_id": 0}), ("config.json", {"eos_token_id": 0})):
        settings = json.loads((model / file).read_text())
        (model / file).write_text(json.dumps(settings | said))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    with suite_serve(tmp_path, "--model", model) as running:
        asked = {"model": "bare", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 60}
        choice = running.http.post("/v1/chat/completions", json=asked | {"temperature": 0}).json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    assert choice["message"]["content"].startswith("I am nano")
