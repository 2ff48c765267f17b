"""Answers that must have a form, and every field that changes how tokens are picked, over HTTP."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel, Field

from tests.contract.conftest import Served

QUESTION: list[Any] = [{"role": "user", "content": "Who are you?"}]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def chat(served: Served, model: str = "base", **more: Any) -> Any:
    settings = {"max_tokens": 300, "temperature": 1.0, "seed": 1, "messages": QUESTION, **more}
    return served.openai.chat.completions.create(model=model, **settings)


def schema(given: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": given, "strict": strict}}


def test_a_schema_is_kept_to_in_every_sample_and_streamed(served: Served) -> None:
    got = chat(served, n=4, response_format=schema(PERSON))
    for choice in got.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in got.choices}) > 1
    chunks = chat(served, "a", response_format=schema(PERSON), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    jsonschema.validate(json.loads(text), PERSON)
    assert text == chat(served, "a", response_format=schema(PERSON)).choices[0].message.content


def test_a_schema_from_pydantic_is_parsed_by_the_client(served: Served) -> None:
    class City(BaseModel):
        name: str = Field(max_length=8)
        large: bool

    got = served.openai.chat.completions.parse(
        model="base", messages=QUESTION, response_format=City, max_tokens=200, temperature=1.0, seed=3
    )
    assert isinstance(got.choices[0].message.parsed, City)


def test_any_object_that_is_cut_off_is_no_error(served: Served) -> None:
    got = chat(served, response_format={"type": "json_object"}, max_tokens=5)
    assert got.choices[0].message.content.startswith("{")
    assert got.choices[0].finish_reason == "length"
    free = {"temperature": 0, "max_tokens": 12}
    assert chat(served, **free, response_format={"type": "text"}).choices == chat(served, **free).choices


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["red", "green\n", '"blue"', "<tool_call>"]}, 'red|green\n|"blue"|<tool_call>'),
        ({"grammar": 'start: "SELECT " /[a-z]{1,5}/ (", " /[a-z]{1,5}/)~0..2'}, "SELECT [a-z]{1,5}(, [a-z]{1,5}){0,2}"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"json": {"type": "boolean"}}, "true|false"),
        ({"json": '{"const": 5}'}, "5"),
    ],
)
def test_structured_outputs(served: Served, constraint: dict[str, Any], pattern: str) -> None:
    got = chat(served, n=3, extra_body={"structured_outputs": constraint})
    assert all(re.fullmatch(pattern, choice.message.content) for choice in got.choices)
    text = served.openai.completions.create(
        model="a", prompt="The quick", max_tokens=100, extra_body={"structured_outputs": constraint}
    )
    assert re.fullmatch(pattern, text.choices[0].text)


def test_constrained_answers_leave_others_alone(served: Served) -> None:
    alone = chat(served, temperature=0, max_tokens=20).choices[0].message.content
    biased = {"logit_bias": {"5": 100}, "temperature": 0, "max_tokens": 5}
    assert chat(served, **biased).choices[0].message.content != alone
    assert chat(served, temperature=0, max_tokens=20).choices[0].message.content == alone


def test_fields_that_change_the_answer(served: Served) -> None:
    greedy = {"temperature": 0, "max_tokens": 40}
    plain = chat(served, **greedy).choices[0].message.content
    for field in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 2.0}},
        {"logit_bias": {"100": 100}},
    ):
        assert chat(served, **greedy, **field).choices[0].message.content != plain, field
    cold = {"temperature": 1.0, "max_tokens": 40, "extra_body": {"min_p": 1.0}}
    assert chat(served, **cold).choices[0].message.content == plain


def test_tokens_that_end_an_answer(served: Served) -> None:
    forced = {"temperature": 0, "max_tokens": 9, "logit_bias": {"100": 100}, "ignore_eos": True}
    body = {"model": "base", "messages": QUESTION, **forced, "stop_token_ids": [100, 101]}
    answer = served.http.post("/v1/chat/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == 1
    assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["message"]["content"]) == ("stop", "")


def test_logprobs_are_the_models_own(served: Served) -> None:
    plain = chat(served, temperature=0, max_tokens=1, logprobs=True, top_logprobs=2).choices[0].logprobs.content[0]
    bent = chat(
        served, temperature=0, max_tokens=1, logprobs=True, top_logprobs=2, presence_penalty=1, logit_bias={"7": 100}
    )
    entry = bent.choices[0].logprobs.content[0]
    assert [top.token for top in entry.top_logprobs] == [top.token for top in plain.top_logprobs]
    assert [t.logprob for t in entry.top_logprobs] == pytest.approx([t.logprob for t in plain.top_logprobs], abs=1e-4)
    assert entry.logprob < plain.logprob


def test_min_tokens_hold_back_the_end_and_stop_strings(served: Served) -> None:
    free = served.openai.completions.create(model="base", prompt="The quick", max_tokens=30, temperature=0)
    stop = free.choices[0].text[:2]
    held = served.openai.completions.create(
        model="base", prompt="The quick", max_tokens=30, temperature=0, stop=stop, extra_body={"min_tokens": 12}
    )
    assert held.usage.completion_tokens >= 12
    assert held.choices[0].text.startswith(stop)
