"""The functions of Go's templates that exports use, and the values they work on: text is bytes, all numbers are floats.

A piece of text that `slice` cut inside a character has surrogate escapes in it; `whole` puts the pieces together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


class TemplateSyntaxError(ValueError):
    """The template uses what the renderer does not know, or is no template."""


class Struct(dict[str, Any]):
    """A Go struct for `json`, which keeps the order of its fields; a plain dict is a Go map, whose keys are sorted."""


def quote(text: str) -> str:
    """`text` as a Go string literal.

    >>> quote('say "{{"')
    '"say \\\\"{{\\\\""'
    """
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    short = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return short.get(char) or (f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}")


def _equal(first: Any, *others: Any) -> bool:
    if not others or any(type(first) is not type(other) for other in others):
        raise TemplateSyntaxError("eq compares values of one type")
    return any(first == other for other in others)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def whole(text: str) -> str:
    """`text` with the pieces of cut characters put together."""
    return _bytes(text).decode("utf-8", "surrogateescape")


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    given = _bytes(value) if isinstance(value, str) else value
    end = len(given) if end is None else end
    if not 0 <= start <= end <= len(given):
        raise TemplateSyntaxError(f"cannot slice {len(given)} from {start} to {end}")
    return given[start:end].decode("utf-8", "surrogateescape") if isinstance(given, bytes) else given[start:end]


def _index(value: Any, i: int) -> Any:
    if not 0 <= i < len(value):
        raise TemplateSyntaxError(f"cannot index {len(value)} at {i}")
    return value[i]


def go_json(value: Any) -> str:
    """Go's json.Marshal: no spaces, sorted keys, and what HTML means something by escaped."""
    if isinstance(value, dict):
        items = value.items() if isinstance(value, Struct) else sorted(value.items())
        return "{" + ",".join(f"{go_json(k)}:{go_json(v)}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(go_json, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(JSON_ESCAPES.get(c, "\\ufffd" if "\ud800" <= c <= "\udfff" else c) for c in value) + '"'
    if isinstance(value, float | int) and not isinstance(value, bool):
        return _number(float(value))
    return json.dumps(value)


def _number(value: float) -> str:
    """A number as Go's JSON has it: all are floats, and only the very small and large get an exponent."""
    if value.is_integer() and abs(value) < 1e21:
        return str(int(value))
    text = repr(value)
    if 1e-6 <= abs(value) < 1e21 and "e" in text:
        return f"{value:.{len(text) + 6}f}".rstrip("0")
    return re.sub(r"e-0(\d)$", r"e-\1", text)


def _printf(form: str, *values: Any) -> str:
    """Go's printf: %s text as it is, %q quoted, where what cannot be printed has an escape, %T the name of a type."""
    if re.search("%[^sqT]|%$", form):
        raise TemplateSyntaxError(f"unknown: printf {form}")
    given = iter(values)
    show: dict[str, Callable[[Any], str]] = {"s": str, "q": quote, "T": lambda value: TYPES[type(value)]}
    return re.sub("%([sqT])", lambda match: show[match[1]](next(given)), form)


TYPES = {str: "string", bool: "bool", int: "float64", float: "float64", type(None): "<nil>"}
TYPES |= {dict: "map[string]interface {}", list: "[]interface {}"}
"""Go's names for what is in arguments."""
JSON_ESCAPES = {chr(i): f"\\u{i:04x}" for i in (*range(0x20), *map(ord, "<>&\u2028\u2029"))}
JSON_ESCAPES |= {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": lambda a, b: not _equal(a, b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "not": lambda value: not value,
    "len": lambda value: len(_bytes(value)) if isinstance(value, str) else len(value),
    "index": _index,
    "slice": _slice,
    "json": go_json,
    "printf": _printf,
}
