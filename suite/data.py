"""The one way to read chat data: rows of any format that `suite.turns` knows, from .json lists and .jsonl files.

A row that cannot be used is left out with its file, line and reason; a file that cannot be parsed is a `SuiteError`
with line and column.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from suite import turns
from suite.errors import SuiteError, near
from suite.turns import BadRow, Message, Tool

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
            messages, tools = turns.read(row)
        except BadRow as reason:
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
