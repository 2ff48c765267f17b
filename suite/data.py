"""The one way to read chat data: alpaca, sharegpt, XTuner and OpenAI rows, from .json lists and .jsonl files.

The format is found row by row. A row that cannot be used is left out with its file, line and reason; a file that
cannot be parsed is a `SuiteError` with line and column.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from suite.errors import SuiteError, near

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
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
PARSED_WHILE_PLANNING = 8 << 20


@dataclass(frozen=True)
class Conversation:
    """One row: OpenAI-style messages that end with an assistant's, the tools on offer, and where it was read."""

    messages: list[Message]
    tools: list[Tool] | None
    file: Path
    line: int


@dataclass(frozen=True)
class LeftOut:
    """One row that is not used, and why."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass
class Rows:
    """What a data file holds; `placeholders` says how often each `{{name}}` stood in it before filling."""

    conversations: list[Conversation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    placeholders: Counter[str] = field(default_factory=Counter)

    def extend(self, other: Rows) -> None:
        """Append the rows of another file."""
        self.conversations += other.conversations
        self.left_out += other.left_out
        self.placeholders += other.placeholders

    def account(self) -> str:
        """One line about the rows left out, with the first place of each reason; empty when there are none."""
        if not self.left_out:
            return ""
        first = {row.reason: row for row in reversed(self.left_out)}
        counts = Counter(row.reason for row in self.left_out).most_common()
        reasons = [f"{n} {reason} ({first[reason].file.name}:{first[reason].line})" for reason, n in counts[:5]]
        if len(counts) > 5:
            reasons.append(f"{len(counts) - 5} other reasons")
        total = len(self.left_out) + len(self.conversations)
        return f"{len(self.left_out)} of {total} rows left out: {'; '.join(reasons)}"


class _BadRowError(Exception):
    """Why one row cannot be used."""


def read(path: Path, fill: Mapping[str, str] | None = None) -> Rows:
    """All conversations of a .json or .jsonl file, with `{{name}}` replaced by `fill["name"]` in every text.

    Raises SuiteError when the file is missing, a directory, empty or not valid JSON.
    """
    rows = Rows()
    fill = fill or {}
    text = _load(path)
    placeholders = "{{" in text
    for line, row in _values(path, text):
        if placeholders:
            row = _fill(row, fill, rows.placeholders)
        try:
            messages, tools = _turns(row)
        except _BadRowError as reason:
            rows.left_out.append(LeftOut(path, line, str(reason)))
        else:
            rows.conversations.append(Conversation(messages, tools, path, line))
    return rows


def check(paths: Sequence[Path], fill: Mapping[str, str] | None = None) -> None:
    """Raise SuiteError when these files cannot be trained on as they are; cheap enough for every plan.

    Wrong are unreadable files, files without a usable row, `{{name}}` without a value, and values that no file asks
    for. Of more than 8 MiB only the existence is checked: reading them is the work of the run.
    """
    fill = fill or {}
    rows = Rows()
    for path in paths:
        _exists(path)
    if sum(path.stat().st_size for path in paths) > PARSED_WHILE_PLANNING:
        return
    for path in paths:
        found = read(path, fill)
        if not found.conversations:
            raise SuiteError(f"no row can be used: {found.account()}", where=str(path), hint=_FORMATS)
        missing = [name for name in found.placeholders if name not in fill]
        if missing:
            example = ", ".join(f'{name} = "..."' for name in missing)
            raise SuiteError(
                "no value for " + ", ".join(f"{{{{{name}}}}} ({found.placeholders[name]} times)" for name in missing),
                where=str(path),
                hint=f"set fill = {{ {example} }}; a name filled with itself stays as it is",
            )
        rows.extend(found)
    unused = next((name for name in fill if name not in rows.placeholders), None)
    if unused is not None:
        hint = near(unused, rows.placeholders) if rows.placeholders else "the data has no placeholders at all"
        raise SuiteError(f"fill.{unused}: no row contains {{{{{unused}}}}}", hint=hint)


_FORMATS = (
    'a row is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, '
    '{"instruction": "...", "output": "..."} or {"conversations": [{"from": "human", "value": "..."}, ...]}'
)


def _exists(path: Path) -> None:
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.suffix in (".json", ".jsonl"))
        hint = "name a file in it: " + ", ".join(files[:8]) if files else "it holds no .json or .jsonl file"
        raise SuiteError("is a directory, expected a .json or .jsonl file", where=str(path), hint=hint)
    if not path.is_file():
        names = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        hint = near(path.name, names) if 0 < len(names) < 30 else "check the path"
        raise SuiteError("no such data file", where=str(path), hint=hint)


def _load(path: Path) -> str:
    _exists(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = "save the file as UTF-8"
        raise SuiteError(f"not UTF-8 text: {error.reason}", where=f"{path}:{line}", hint=hint) from None
    if not text.strip():
        raise SuiteError("the file is empty", where=str(path), hint=_FORMATS)
    return text


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON list or of JSON lines, each with the 1-based line it begins on."""
    if text.lstrip().startswith("["):
        yield from _list_values(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            _explain(path, text, error.msg, sum(len(x) + 1 for x in text.split("\n")[: number - 1]) + error.pos)


_SPACE = re.compile(r"\s*")


def _list_values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decode = json.JSONDecoder().raw_decode

    def skip(position: int) -> int:
        match = _SPACE.match(text, position)
        return match.end() if match else position

    position = skip(text.index("[") + 1)
    line, counted = 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decode(text, position)
        except json.JSONDecodeError as error:
            _explain(path, text, error.msg, error.pos)
        yield line, value
        position = skip(end)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            _explain(path, text, "Expecting ',' delimiter", position)
    rest = skip(position + 1)
    if rest < len(text):
        _explain(path, text, "Extra data", rest)


def _explain(path: Path, text: str, message: str, position: int) -> NoReturn:
    """Raise what is wrong at `position`, in words that say what to type."""
    line, column = text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
    here = text[position : position + 40].split("\n")[0].strip()
    before = text[:position].rstrip().split("\n")
    end = "line" if position < len(text) else "file"
    found = f"before {here!r}" if here else f"at the end of the {end}"
    comma = f"line {len(before)} ends without a comma: {before[-1][-60:]}" if len(before) < line else ""
    layout = "one row a line (.jsonl), or one list [...] around all rows"
    quotes = "JSON wants double quotes, and no comma after the last entry" if here else layout
    expected, hint = {
        "Expecting ',' delimiter": (f"expected ',' or a closing bracket {found}", comma),
        "Expecting property name enclosed in double quotes": (f"expected a key in double quotes {found}", quotes),
        "Expecting value": (f"expected a value {found}", quotes),
        "Expecting ':' delimiter": (f"expected ':' after the key, {found}", ""),
        "Extra data": (f"expected nothing more {found}", layout),
        "Unterminated string starting at": (f"this string has no closing quote: {here!r}", ""),
        "Invalid control character at": ("a string goes over the end of its line", r"write a line break as \n"),
    }.get(message, (f"{message[0].lower()}{message[1:]} {found}", ""))
    raise SuiteError(f"not valid JSON: {expected}", where=f"{path}:{line}:{column}", hint=hint)


def _fill(value: Any, fill: Mapping[str, str], seen: Counter[str]) -> Any:
    if isinstance(value, str):

        def put(match: re.Match[str]) -> str:
            seen[match[1]] += 1
            return fill.get(match[1], match[0])

        return PLACEHOLDER.sub(put, value)
    if isinstance(value, list):
        return [_fill(v, fill, seen) for v in value]
    if isinstance(value, dict):
        return {k: _fill(v, fill, seen) for k, v in value.items()}
    return value


def _turns(row: Any) -> Turns:
    """The messages and tools of one row in any known format; raises _BadRowError with the reason."""
    if not isinstance(row, dict):
        raise _BadRowError(f"not an object but {type(row).__name__}")
    for key in PREFERENCE:
        if key in row and (key != "label" or isinstance(row[key], bool)):
            raise _BadRowError(f"a preference row (has '{key}'), which this stage does not learn from")
    for key, convert in _FORMAT_OF.items():
        if key in row:
            messages = convert(row)
            _check_order(messages)
            return messages, _tools(row.get("tools"))
    raise _BadRowError("unknown format, keys: " + ", ".join(map(str, row)))


def _from_alpaca(row: dict[str, Any]) -> list[Message]:
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise _BadRowError("'history' is no list of [question, answer] pairs")
    question = "\n".join(filter(None, (_text(row.get(key), key) for key in ("instruction", "input"))))
    if not question:
        raise _BadRowError("no instruction")
    messages = _system(row)
    for user, assistant in [*pairs, (question, row.get("output"))]:
        messages.append({"role": "user", "content": _text(user, "instruction")})
        messages.append({"role": "assistant", "content": _text(assistant, "output")})
    return messages


def _from_xtuner(row: dict[str, Any]) -> list[Message]:
    turns = row["conversation"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRowError("no messages")
    messages = _system(turns[0])
    for turn in turns:
        if turn.get("output_with_loss") is False:
            raise _BadRowError("a weight for one message is not supported")
        messages.append({"role": "user", "content": _text(turn.get("input"), "input")})
        messages.append({"role": "assistant", "content": _text(turn.get("output"), "output")})
    return messages


def _from_messages(row: dict[str, Any]) -> list[Message]:
    """OpenAI `messages` and sharegpt `conversations`; either key names may stand in either list."""
    turns = row["messages"] if "messages" in row else row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _BadRowError("no messages")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        if role is None:
            raise _BadRowError(f"message {number}: unknown role {turn.get('role', turn.get('from'))!r}")
        if any(turn.get(key) not in (None, True, 1) for key in ("loss", "loss_scale", "weight")):
            raise _BadRowError(f"message {number}: a weight for one message is not supported")
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
            raise _BadRowError(f"{what}: only text content is supported")
        return "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise _BadRowError(f"{what}: expected text, got {type(value).__name__}")
    return value


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise _BadRowError(f"{what}: not valid JSON ({error.msg.lower()})") from None


def _calls(value: Any, number: int) -> list[Tool]:
    what = f"message {number}: the tool call"
    calls = _parsed(value, what)
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _BadRowError(f"{what} has no name")
        arguments = _parsed(function.get("arguments", {}), what)
        if not isinstance(arguments, dict):
            raise _BadRowError(f"{what} has arguments that are no object")
        identity = {"id": call["id"]} if call.get("id") else {}
        found.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(value: Any) -> list[Tool] | None:
    """A JSON list of functions, bare or in OpenAI's `{"type": "function", "function": ...}`, also as a string."""
    if value is None or value == "":
        return None
    tools = _parsed(value, "tools")
    if not isinstance(tools, list):
        raise _BadRowError("tools: expected a list")
    functions = [t.get("function", t) if isinstance(t, dict) else None for t in tools]
    if not all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions):
        raise _BadRowError("tools: a tool has no name")
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
            raise _BadRowError(f"message {number} ({role}) follows {previous or 'nothing'}")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise _BadRowError("no answer" if number == len(messages) else f"message {number}: no answer")
        if role == "user" and not message["content"].strip():
            raise _BadRowError(f"message {number}: empty question")
        previous = role
    if previous != "assistant":
        raise _BadRowError(f"ends with a {previous} message: no answer to learn")
