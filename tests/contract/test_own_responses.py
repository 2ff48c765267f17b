"""/v1/responses, by OpenAI's own client and types. vLLM has the route too, but says other things there."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASK = "How is the weather in Paris?"
BLOCK = 16
"""How many tokens of a prompt are kept together."""


def ask(client: openai.OpenAI, given: Any = "Who are you?", **more: Any) -> Any:
    return client.responses.create(
        **{"model": "nano", "input": given, "temperature": 0, "max_output_tokens": 80, **more}
    )


def strictly(response: Any) -> Response:
    """What the client was given, checked by its own types; it does not check by itself."""
    return Response.model_validate(response.model_dump(exclude_unset=True))


def test_text(client: openai.OpenAI) -> None:
    got = strictly(ask(client))
    chat = client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=80
    )
    assert got.output_text == chat.choices[0].message.content
    assert (got.status, got.model, got.store if hasattr(got, "store") else False) == ("completed", "nano", False)
    assert [item.type for item in got.output] == ["message"]
    assert got.usage is not None
    assert chat.usage is not None
    assert (got.usage.input_tokens, got.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)


def test_what_was_known_of_a_prompt_is_counted(client: openai.OpenAI) -> None:
    given = "Who are you? " * 10
    _, again = (ask(client, given).usage for _ in range(2))
    chat = client.chat.completions.create(model="nano", messages=[{"role": "user", "content": given}], max_tokens=1)
    known = (again.input_tokens - 1) // BLOCK * BLOCK
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == again.input_tokens_details.cached_tokens == known > 0


def test_a_conversation_as_items(client: openai.OpenAI) -> None:
    parts = [
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Who are "}, {"type": "input_text", "text": "you?"}],
        }
    ]
    first = ask(client, parts)
    assert first.output_text == ask(client).output_text
    again = ask(client, [*parts, *first.output, {"role": "user", "content": "Who are you?"}], instructions="Be brief.")
    assert again.status == "completed"
    assert again.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_cut_off(client: openai.OpenAI) -> None:
    got = strictly(ask(client, max_output_tokens=2))
    assert got.status == "incomplete"
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"


def test_a_function_is_called_and_its_output_read(client: openai.OpenAI) -> None:
    got = strictly(ask(client, ASK, tools=[WEATHER]))
    (call,) = got.output
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert list(json.loads(call.arguments)) == ["city"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
    after = strictly(ask(client, [{"role": "user", "content": ASK}, call, output], tools=[WEATHER]))
    assert [item.type for item in after.output] == ["message"]
    assert after.output_text


@pytest.mark.parametrize("tools", [[], [WEATHER]])
def test_the_stream_tells_the_same(client: openai.OpenAI, tools: list[Any]) -> None:
    whole = ask(client, ASK, tools=tools)
    with client.responses.stream(model="nano", input=ASK, temperature=0, max_output_tokens=80, tools=tools) as stream:
        events = list(stream)
    final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:3]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert events[-1].type == "response.completed"
    assert events[-2].type == "response.output_item.done"
    kind = "response.function_call_arguments.delta" if tools else "response.output_text.delta"
    deltas = "".join(event.delta for event in events if event.type == kind)
    assert sum(event.type == kind for event in events) > 1
    if tools:
        assert deltas == whole.output[0].arguments == final.output[0].arguments
    else:
        assert deltas == whole.output_text == final.output_text
    assert final.usage.total_tokens == whole.usage.total_tokens


def test_every_event_has_its_own_type(client: openai.OpenAI) -> None:
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    types: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    body = {"model": "nano", "input": ASK, "tools": [WEATHER], "temperature": 0, "stream": True}
    answer = client._client.post("responses", json=body)
    names = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = types.validate_python(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {event.type}"
        names.append(event.type)
    assert "response.function_call_arguments.done" in names


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"given": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"given": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages"),
        ({"given": []}, "messages"),
        ({"given": [{"type": "function_call", "call_id": "x"}]}, "messages"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "none"}}, None),
    ],
)
def test_what_it_refuses(client: openai.OpenAI, more: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **more)
    assert error.value.param == param


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ask(client).id)
