"""The turns of one row of chat data: alpaca, sharegpt, XTuner and OpenAI, told by the row's keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]
Turns = tuple[list[Message], list[Tool] | None]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "tool_call"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "function"), "tool"),
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
PREFERENCE = ("chosen", "rejected", "rejected_response", "rejected_messages", "label")


class BadRow(Exception):
    """Why one row cannot be used."""


def read(row: Any) -> Turns:
    """The messages and tools of one row in any known format; raises BadRow with the reason."""
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {type(row).__name__}")
    for key in PREFERENCE:
        if key in row and (key != "label" or isinstance(row[key], bool)):
            raise BadRow(f"a preference row (has '{key}'), which this stage does not learn from")
    for key, convert in _FORMAT_OF.items():
        if key in row:
            messages = convert(row)
            _check_order(messages)
            return messages, _tools(row.get("tools"))
    raise BadRow("unknown format, keys: " + ", ".join(map(str, row)))


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise BadRow("'history' is no list of [question, answer] pairs")
    question = "\n".join(filter(None, (_text(row.get(key), key) for key in ("instruction", "input"))))
    if not question:
        raise BadRow("no instruction")
    messages = _system(row)
    for user, assistant in [*pairs, (question, row.get("output"))]:
        messages.append({"role": "user", "content": _text(user, "instruction")})
        messages.append({"role": "assistant", "content": _text(assistant, "output")})
    return messages


def _from_xtuner(row: dict[str, Any]) -> list[Message]:
    turns = row["conversation"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("no messages")
    messages = _system(turns[0])
    for turn in turns:
        if turn.get("output_with_loss") is False:
            raise BadRow("a weight for one message is not supported")
        messages.append({"role": "user", "content": _text(turn.get("input"), "input")})
        messages.append({"role": "assistant", "content": _text(turn.get("output"), "output")})
    return messages


def _from_messages(row: dict[str, Any]) -> list[Message]:
    """OpenAI `messages` and sharegpt `conversations`; either key names may stand in either list."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("no messages")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise BadRow(f"message {number}: unknown role {turn.get('role', turn.get('from'))!r}")
        if any(turn.get(key) not in (None, True, 1) for key in ("loss", "loss_scale", "weight")):
            raise BadRow(f"message {number}: a weight for one message is not supported")
        content = _text(turn.get("content", turn.get("value")), f"message {number}")
        if role == "tool_call":
            _add_calls(messages, _calls(content, number))
            continue
        kept = {key: turn[key] for key in KEPT if turn.get(key)}
        if "tool_calls" in kept:
            kept["tool_calls"] = _calls(kept["tool_calls"], number)
        messages.append({"role": role, "content": content, **kept})
    return messages if messages[0]["role"] == "system" else _system(row) + messages


def _add_calls(messages: list[Message], calls: list[Tool]) -> None:
    """Consecutive calls are parallel, and text before them belongs to the same turn."""
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).extend(calls)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})


_FORMAT_OF: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_messages,
    "conversation": _from_xtuner,
    "instruction": _from_alpaca,
}


def _system(row: dict[str, Any]) -> list[Message]:
    system = _text(row.get("system"), "system")
    return [{"role": "system", "content": system}] if system else []


def _text(value: Any, what: str) -> str:
    """A string, or the text of OpenAI's content parts."""
    if value is None:
        return ""
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise BadRow(f"{what}: only text content is supported")
        return "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{what}: expected text, got {type(value).__name__}")
    return value


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadRow(f"{what}: not valid JSON ({error.msg.lower()})") from None


def _calls(value: Any, number: int) -> list[Tool]:
    what = f"message {number}: the tool call"
    calls = _parsed(value, what)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"{what} has no name")
        arguments = _parsed(function.get("arguments", {}), what)
        if not isinstance(arguments, dict):
            raise BadRow(f"{what} has arguments that are no object")
        identity = {"id": call["id"]} if call.get("id") else {}
        found.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(value: Any) -> list[Tool] | None:
    """A JSON list of functions, bare or in OpenAI's `{"type": "function", "function": ...}`, also as a string."""
    if value is None or value == "":
        return None
    tools = _parsed(value, "tools")
    if not isinstance(tools, list):
        raise BadRow("tools: expected a list")
    functions = [t.get("function", t) if isinstance(t, dict) else None for t in tools]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise BadRow("tools: a tool has no name")
    return [{"type": "function", "function": f} for f in functions] or None


_FOLLOWS = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_order(messages: list[Message]) -> None:
    previous = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if previous not in _FOLLOWS[role]:
            raise BadRow(f"message {number} ({role}) follows {previous or 'nothing'}")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow("no answer" if number == len(messages) else f"message {number}: no answer")
        if role == "user" and not message["content"].strip():
            raise BadRow(f"message {number}: empty question")
        previous = role
    if previous != "assistant":
        raise BadRow(f"ends with a {previous} message: no answer to learn")
