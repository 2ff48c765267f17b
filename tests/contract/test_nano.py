"""The model that comes with the suite, served: it says who it is, and calls tools in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import openai

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
