"""Calls whose every argument stands between marks of its own, as models of the Qwen3-Coder, GLM and DeepSeek-V3.2 kind
write them; the form is read off the chat template.

    <tool_call><function=NAME><parameter=KEY>VALUE</parameter><parameter=KEY>VALUE</parameter></function></tool_call>
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from serve.calls import Calls
from serve.text import begun
from suite.chat import common_prefix, common_suffix

PROBE = {"probe_key": "probe value", "probe_list": [7, 8]}
"""Arguments of the calls that a template is asked to write, so that `read_off` finds its marks."""
_ONE = re.compile(r"probe_one(.*?)probe_key(.*?)probe value(.*?)probe_list(.*?)\[7, ?8\](.*)", re.DOTALL)
_TWO = re.compile(r"\[7, ?8\](.*?)probe_two", re.DOTALL)
_HEAD = re.compile(r"\s*([^\s<>\[\]{}()\"'`=|]+)")
_NO_WORDS = re.compile(r'(?:[\s">=]|<[^<>]*>)*|"[^<]*')
"""What may stand between a name and the first key or the end: marks and attributes, no prose."""
_MARK = re.compile(r"<[^<>\s][^<>]*>")
_CDATA = re.compile(r"<!\[CDATA\[(.*)\]\]>", re.DOTALL)
_LONGEST_HEAD, _LONGEST_MARK = 256, 64


@dataclass(frozen=True)
class Spelling:
    """Calls to the letter, for answers that are held to them.

    first NAME middle ARGUMENTS between NAME middle ARGUMENTS last; each argument is: key KEY text VALUE end, with
    `other` in place of `text` before a value that is no text.
    """

    first: str
    middle: str
    between: str
    last: str
    key: str
    text: str
    other: str
    end: str


@dataclass(frozen=True)
class MarkedForm:
    """What a template writes around names, keys and values of calls.

    section opening NAME … key KEY valued VALUE close key KEY valued VALUE close … closings
    """

    section: str
    """The mark that stands before all calls, or before the opening of each; "" where there is none."""
    opening: str
    key: str
    valued: re.Pattern[str]
    """From a key to its value; some name the value's type there."""
    padding: str
    """White space that the template puts on both sides of a value."""
    close: str
    closings: tuple[str, ...]
    """Marks that may follow a call."""
    spelling: Spelling | None = None
    """None where a call's last argument ends otherwise than those before it."""

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """All marks of the form."""
        whole = "".join((self.section, self.opening, self.key, self.close, *self.closings))
        return (*_MARK.findall(whole), *_MARK.findall(self.valued.pattern.replace("\\", "")))


def read_off(one: str, two: str, closing_tokens: tuple[str, ...]) -> MarkedForm | None:
    """The form in an assistant's turn with a call of `probe_one`, and one with `probe_two` after it, both with `PROBE`;
    None where arguments stand otherwise. `closing_tokens` end a turn, and belong to no call."""
    found, second = _ONE.search(one), _TWO.search(two)
    if not found or not second:
        return None
    named, valued, following, other, last = found.groups()
    first = one[: found.start()].lstrip()
    between = second[1]
    shared = common_suffix(named, following)
    key = shared[shared.rfind("<") :].strip() if "<" in shared else ""
    close = following[: following.rfind(key)].strip() if key else ""
    shared = common_suffix(first, between)
    opening = shared[shared.find("<") :].strip() if "<" in shared else ""
    if not (key and close and opening):
        return None
    for token in closing_tokens:
        last = last.partition(token)[0]
    spelling, end = None, following[: following.rfind(key)]
    if between.startswith(end) and last.startswith(end):
        middle, key_text = named[: named.rfind(key)], named[named.rfind(key) :]
        rest = between.removeprefix(end), last.removeprefix(end).rstrip()
        spelling = Spelling(first, middle, *rest, key_text, valued, other, end)
    section = first.removesuffix(opening).strip()
    if not section and (apart := re.search(r">\s+(?=<)", opening)):
        # models leave out the space between two marks
        section, opening = opening[: apart.start() + 1], opening[apart.end() :]
    after = between.removesuffix(opening).strip().removeprefix(close) + last.strip().removeprefix(close)
    closings = tuple(dict.fromkeys(mark for mark in _MARK.findall(after) if mark != section))
    padding = "\n" if valued.endswith("\n") and following.startswith("\n") else ""
    return MarkedForm(section, opening, key, _between(valued, other), padding, close, closings, spelling)


def _between(one: str, other: str) -> re.Pattern[str]:
    """What two texts have in common at both ends, with anything between them where they differ."""
    if one.strip() == other.strip():
        return re.compile(_spaced(one))
    before = one[: common_prefix(one, other)]
    after = common_suffix(one[len(before) :], other[len(before) :])
    return re.compile(_spaced(before) + "[^<>]*?" + _spaced(after))


def _spaced(text: str) -> str:
    return r"\s*".join(re.escape(word) for word in text.split())


class MarkedCalls(Calls):
    """Tells such calls from content; values become JSON as the schemas of `tools` say.

    An argument is shown when it is complete. A value that is no text in its schema is read as JSON, or as Python
    writes it; what is neither stays text.
    """

    def __init__(self, form: MarkedForm, tools: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(form.section, form.opening)
        self._form, self._tools = form, tools
        self._name = self._key = ""
        self._given = 0

    def _head(self, final: bool) -> bool:
        found = _HEAD.match(self._buffer)
        mark = self._first([*self._form.closings, self._form.key])
        if mark and mark[0] <= _LONGEST_HEAD:
            if not (found and found.end() <= mark[0] and _NO_WORDS.fullmatch(self._buffer, found.end(), mark[0])):
                return self._refuse(0)
            self._name, self._given = found[1], 0
            self._begin(self._name)
            self._take(mark[0])
            self._state = self._parameter
            return True
        if final or len(self._buffer) > _LONGEST_HEAD + _LONGEST_MARK:
            return self._refuse(0)
        return False

    def _parameter(self, _: bool) -> bool:
        """Before a key, or at the end of the call."""
        marks = [*self._form.closings, self._form.key]
        found = self._first(marks)
        if found is None:
            self._take(len(self._buffer) - begun(self._buffer, marks))
            return False
        at, mark = found
        if mark == self._form.key:
            self._take(at + len(mark))
            self._state = self._naming
        else:
            self._take(at)
            self._argue("}" if self._given else "{}")
            self._state = self._between
        return True

    def _naming(self, _: bool) -> bool:
        """The key, up to its value."""
        found = self._form.valued.search(self._buffer)
        # white space at its end may be the value's, and is cut with it
        if not found:
            return False
        self._key = self._buffer[: found.start()].strip()
        self._take(found.end())
        self._state = self._value
        return True

    def _value(self, _: bool) -> bool:
        end = self._buffer.find(self._form.close)
        if end < 0:
            return False
        text = self._take(end)
        self._take(len(self._form.close))
        if self._form.padding:
            text = text.removeprefix(self._form.padding).removesuffix(self._form.padding)
        key, value = (json.dumps(part, ensure_ascii=False) for part in (self._key, self._typed(text)))
        self._argue(f"{', ' if self._given else '{'}{key}: {value}")
        self._given += 1
        self._state = self._parameter
        return True

    def _typed(self, text: str) -> Any:
        if cdata := _CDATA.fullmatch(text):
            return cdata[1]
        schema = self._tools.get(self._name, {}).get("properties", {}).get(self._key, {})
        if isinstance(schema, Mapping) and schema.get("type") == "string":
            return text
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = read(text.strip())
                json.dumps(value)  # Python writes more than JSON can
                return value
        return text

    def _between(self, final: bool) -> bool:
        self._take(len(self._buffer) - len(self._buffer.lstrip()))
        for mark in self._form.closings:
            if self._buffer.startswith(mark):
                self._take(len(mark))
                return True
        if self._buffer.startswith(self._opening):
            self._open()
            return True
        if not final and any(mark.startswith(self._buffer) for mark in (*self._form.closings, self._opening)):
            return False
        self._state = self._content
        return bool(self._buffer)

    def _first(self, marks: list[str]) -> tuple[int, str] | None:
        return min(((at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0), default=None)
