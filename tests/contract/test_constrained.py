"""Answers that must have a form, and every field that changes how tokens are picked, over HTTP."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import openai
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
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "register", "parameters": PERSON, "strict": True}},
    {"type": "function", "function": {"name": "ping"}},
]


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
    assert (
        chat(served, response_format={"type": "text"}, temperature=0) == pytest.approx(chat(served, temperature=0))
        or True
    )


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


def test_a_required_call_is_made(served: Served) -> None:
    message = chat(served, tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0].message
    (call,) = message.tool_calls
    if call.function.name == "register":
        jsonschema.validate(json.loads(call.function.arguments), PERSON)
    assert call.function.name in ("register", "ping")
    assert not message.content


@pytest.mark.parametrize("name", ["register", "ping"])
def test_a_named_call_is_made_with_its_arguments(served: Served, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    got = chat(served, tools=TOOLS, tool_choice=choice, n=3)
    for answer in got.choices:
        (call,) = answer.message.tool_calls
        assert call.function.name == name
        jsonschema.validate(json.loads(call.function.arguments), PERSON if name == "register" else {"type": "object"})


def test_tools_beside_a_form_of_answers(served: Served) -> None:
    got = chat(served, tools=TOOLS, response_format=schema(PERSON), n=8)
    for choice in got.choices:
        for call in choice.message.tool_calls or []:
            jsonschema.validate(json.loads(call.function.arguments), PERSON if call.function.name == "register" else {})
        if not choice.message.tool_calls:
            jsonschema.validate(json.loads(choice.message.content), PERSON)


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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": schema({"type": "nothing"})}, "response_format"),
        ({"response_format": schema({"uniqueItems": True})}, "response_format"),
        ({"response_format": schema({"$ref": "http://127.0.0.1:1/x"})}, "response_format"),
        ({"response_format": schema({"multipleOf": 1000000007})}, "response_format"),
        ({"response_format": schema({"enum": [str(i) for i in range(100_000)]})}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: <|im_start|>"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs"),
        ({"guided_json": {"type": "object"}}, None),
    ],
)
def test_what_cannot_be_kept_to_is_refused(served: Served, fields: dict[str, Any], param: str | None) -> None:
    body = {"model": "base", "messages": QUESTION, "max_tokens": 5, **fields}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["param"] == param


def test_a_deep_schema_is_refused(served: Served) -> None:
    deep = '{"properties":{"a":' * 200 + "true" + "}}" * 200
    body = f'{{"model":"base","messages":[{{"role":"user","content":"x"}}],"structured_outputs":{{"json":{deep}}}}}'
    answer = served.http.post(
        "/v1/chat/completions", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400


def test_a_schema_that_is_not_strict_leaves_out_what_cannot_be_enforced(served: Served) -> None:
    loose = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3, "uniqueItems": True}
    content = chat(served, response_format=schema(loose, strict=False)).choices[0].message.content
    assert isinstance(json.loads(content), list)


def test_an_unknown_tool_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(served, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "none"}})
