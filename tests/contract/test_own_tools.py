"""tool_choice and parallel calls in the form that the template writes; no parser has to be named, as vLLM wants it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk


def tool(name: str, *arguments: str) -> Any:
    properties = {argument: {"type": "string", "maxLength": 8} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": [*arguments], "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


TOOLS = [tool("get_weather", "city"), tool("add", "a", "b")]
HELLO: list[Any] = [{"role": "user", "content": "Who are you?"}]


def ask(client: openai.OpenAI, choice: Any, **more: Any) -> Any:
    settings = {"temperature": 0, "max_tokens": 120, "tools": TOOLS, "tool_choice": choice, **more}
    return client.chat.completions.create(model="nano", messages=HELLO, **settings)


def test_a_call_is_required(client: openai.OpenAI) -> None:
    got = ask(client, "required")
    ChatCompletion.model_validate(got.model_dump(exclude_unset=True), strict=True)
    assert got.choices[0].finish_reason == "tool_calls"
    assert got.choices[0].message.tool_calls
    for call in got.choices[0].message.tool_calls:
        wanted = next(t for t in TOOLS if t["function"]["name"] == call.function.name)["function"]["parameters"]
        assert list(json.loads(call.function.arguments)) == wanted["required"]


@pytest.mark.parametrize("name", ["get_weather", "add"])
def test_a_function_is_named(client: openai.OpenAI, name: str) -> None:
    (call,) = ask(client, {"type": "function", "function": {"name": name}}).choices[0].message.tool_calls
    assert call.function.name == name
    assert json.loads(call.function.arguments)


def test_none_and_auto(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(model="nano", messages=HELLO, temperature=0, max_tokens=120)
    none = ask(client, "none")
    assert none.choices[0].message.content == free.choices[0].message.content
    assert none.usage == free.usage
    assert ask(client, "auto").choices[0].message.content


def test_one_call_at_most(client: openai.OpenAI) -> None:
    got = ask(client, "required", parallel_tool_calls=False)
    assert len(got.choices[0].message.tool_calls) == 1


def test_a_required_call_streams(client: openai.OpenAI) -> None:
    (call, *_) = ask(client, "required", parallel_tool_calls=False).choices[0].message.tool_calls
    chunks = list(ask(client, "required", parallel_tool_calls=False, stream=True))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(exclude_unset=True), strict=True)
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == call.function.name
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_parallel_calls_stream(client: openai.OpenAI) -> None:
    more: Any = {"tools": TOOLS, "tool_choice": "required", "temperature": 0, "max_tokens": 120}
    more["extra_body"] = {"min_tokens": 40}  # nano ends after one call where it may
    whole = client.chat.completions.create(model="nano", messages=HELLO, **more).choices[0].message.tool_calls
    with client.chat.completions.stream(model="nano", messages=HELLO, **more) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    calls = [[(call.function.name, call.function.arguments) for call in found or []] for found in (whole, streamed)]
    assert calls[0] == calls[1]
    assert len(calls[0]) == len({call.id for call in streamed or []}) > 1


def test_choices_that_fit_no_tool(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="other"):
        ask(client, {"type": "function", "function": {"name": "other"}})
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(client, "required", tools=[])
