"""Calls of tools, compared by JSON value."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Call = Mapping[str, Any]


def said(reply: str) -> list[dict[str, Any]]:
    """The calls that an endpoint's message had, in order, from the reply's text.

    They are its last lines, in the one form in which `evalsets.ask.said` writes them; what a model wrote into its
    text, and the endpoint did not take for a call, has another form and is none.
    """
    found: list[dict[str, Any]] = []
    for line in reversed(reply.split("\n")):
        try:
            call = json.loads(line)
            if call.keys() != {"name", "arguments"} or json.dumps(call, sort_keys=True, ensure_ascii=False) != line:
                break
        except (ValueError, AttributeError, RecursionError):
            break
        found.append(call)
    return found[::-1]


def equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: 1 is 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def same_names(calls: Sequence[Call], expected: Sequence[Call]) -> bool:
    """Whether the same tools are called equally often, in any order."""
    return sorted(str(call["name"]) for call in calls) == sorted(str(call["name"]) for call in expected)


def right_arguments(calls: Sequence[Call], expected: Sequence[Call]) -> int:
    """How many of the expected calls were made with just their arguments; each made call counts once."""
    left = list(calls)
    for wanted in expected:
        same = (i for i, call in enumerate(left) if call["name"] == wanted["name"] and _same_arguments(call, wanted))
        if (index := next(same, None)) is not None:
            del left[index]
    return len(calls) - len(left)


def _same_arguments(call: Call, wanted: Call) -> bool:
    return equal(call["arguments"], wanted["arguments"])


def valid(call: Call, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call is of an offered tool (OpenAI's form), with arguments that its JSON schema allows."""
    import jsonschema

    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if call["name"] not in schemas or not isinstance(call["arguments"], dict):
        return False
    try:
        jsonschema.validate(call["arguments"], schemas[call["name"]])
    except jsonschema.ValidationError:
        return False
    return True
