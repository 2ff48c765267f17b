"""Calls of tools that have to be made, and constraints that are refused: what our engine has to itself."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.contract.conftest import Served
from tests.contract.test_constrained import PERSON, QUESTION, chat, schema

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "register", "parameters": PERSON, "strict": True}},
    {"type": "function", "function": {"name": "ping"}},
]


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
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs"),
        ({"guided_json": {"type": "object"}}, None),
    ],
)
def test_what_is_no_request_is_refused(served: Served, fields: dict[str, Any], param: str | None) -> None:
    refused(served, fields, 400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": schema({"type": "nothing"})}, "response_format"),
        ({"response_format": schema({"uniqueItems": True})}, "response_format"),
        ({"response_format": schema({"$ref": "http://127.0.0.1:1/x"})}, "response_format"),
        ({"response_format": schema({"multipleOf": 1000000007})}, "response_format"),
        ({"response_format": schema({"enum": [str(i) for i in range(100_000)]})}, "response_format"),
        ({"structured_outputs": {"regex": "(("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: <|im_start|>"}}, "structured_outputs"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(served: Served, fields: dict[str, Any], param: str) -> None:
    refused(served, fields, 422, param)


def refused(served: Served, fields: dict[str, Any], status: int, param: str | None) -> None:
    body = {"model": "base", "messages": QUESTION, "max_tokens": 5, **fields}
    answer = served.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"]
    assert error["param"] == param


@pytest.mark.parametrize(("levels", "status"), [(40, 422), (200, 400)])  # a deep schema; one that is too deep for JSON
def test_a_deep_schema_is_refused(served: Served, levels: int, status: int) -> None:
    deep = '{"properties":{"a":' * levels + "true" + "}}" * levels
    body = f'{{"model":"base","messages":[{{"role":"user","content":"x"}}],"structured_outputs":{{"json":{deep}}}}}'
    answer = served.http.post(
        "/v1/chat/completions", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status


def test_a_schema_that_is_not_strict_leaves_out_what_cannot_be_enforced(served: Served) -> None:
    loose = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3, "uniqueItems": True}
    content = chat(served, response_format=schema(loose, strict=False)).choices[0].message.content
    assert isinstance(json.loads(content), list)


def test_an_unknown_tool_is_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(served, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "none"}})
