"""Calls of tools in the text of an answer, found as the text comes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from serve.dialect import CallForm
from serve.text import begun

_MEMBERS = re.compile(
    r'\s*\[?\s*\{\s*(?:"\w+"\s*:\s*"[^"\\]*"\s*,\s*){0,2}?"(?:\w+_)?name"\s*:\s*"(?P<name>[^"\\]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""An object up to the brace of its arguments; two members may come before the name, as `"type": "function"` does."""
_NAMED = re.compile(r"\s*(?P<name>[^\s<>\[\]{}()\"`]+)[^{}]{0,80}?(?=\{)")
"""A name and marks up to the brace of the arguments."""
_LONGEST_HEAD = 256


@dataclass(frozen=True)
class Part:
    """A piece of an answer: of its reasoning, its content, or the arguments of its call number `call`.

    Of kind "call" it begins that call, and `text` is the name of the function.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    call: int = 0


class CallParser:
    """Tells calls in `form` from content; the parts do not depend on where the text is cut into pieces.

    content ──opening──> head ──name, {──> arguments ──}──> rest of the object ──> between ──next call──> head
       ^                  └─ no call: it is content                                   │
       └──────────────────────────── anything but space and closing marks ────────────┘

    A call counts from its name and the brace of its arguments on, so that it can be shown as it comes; what is cut off
    later stays a call, as with OpenAI. Where nothing marks calls they stand at the beginning of an answer, and only
    `names` can be called. White space around calls is dropped.
    """

    def __init__(self, form: CallForm, names: Collection[str]) -> None:
        self._form, self._names = form, names
        self._starts = [mark for mark in (form.section, form.opening) if mark]
        self._listed = form.in_list or not self._starts
        self._refusals = [mark for mark in form.closings if mark not in form.middle]
        self._buffer = ""  # not told apart yet
        self._opened = ""  # the mark before it, which is content should no call follow
        self._space = ""  # white space at the end of the content so far
        self._spoken = False
        self._calls = 0
        self._object = _ObjectEnd()
        self._parts: list[Part] = []
        self._state: Callable[[bool], bool] = self._content if self._starts else self._head

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain now; `final` says that no more text comes."""
        self._buffer += text
        while self._state(final):
            pass
        if final and self._space and not self._calls:
            self._parts.append(Part("content", self._space))
        parts, self._parts = self._parts, []
        return parts

    def _content(self, final: bool) -> bool:
        places = [(at, mark) for mark in self._starts if (at := self._buffer.find(mark)) >= 0]
        if not places:
            self._say(self._take(len(self._buffer) - (0 if final else begun(self._buffer, self._starts))))
            return False
        at, mark = min(places)
        self._say(self._take(at))
        if mark == self._form.opening:
            self._open()
        else:
            self._take(len(mark))
            self._state = self._between
        return True

    def _head(self, final: bool) -> bool:
        found = (_MEMBERS if self._form.in_object else _NAMED).match(self._buffer)
        if found and self._callable(found["name"]):
            self._begin(found["name"])
            self._take(found.end())
            self._object, self._state = _ObjectEnd(), self._arguments
            return True
        text = self._buffer.lstrip(" \n\r\t[")
        if self._form.in_object and text.startswith("{"):
            end = _ObjectEnd().scan(text)
            if end is not None:
                return self._whole(text[:end], len(self._buffer) - len(text) + end)
        ends = [at + len(mark) for mark in self._refusals if (at := self._buffer.find(mark)) >= 0]
        if ends:
            return self._refuse(min(ends))
        if final:
            return self._refuse(len(self._buffer))
        if text and (text[0] != "{" if self._form.in_object else len(text) > _LONGEST_HEAD or "{" in text):
            return self._refuse(0)
        return False

    def _whole(self, text: str, end: int) -> bool:
        """An object whose members stand in another order, `end` characters on."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError):
            return self._refuse(end)
        name = given.get("name")
        arguments = given.get("arguments", given.get("parameters")) or {}
        if not isinstance(name, str) or not self._callable(name):
            return self._refuse(end)
        self._begin(name)
        as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        self._parts.append(Part("arguments", as_text, self._calls - 1))
        self._take(end)
        self._state = self._between
        return True

    def _arguments(self, _: bool) -> bool:
        end = self._object.scan(self._buffer)
        text = self._take(len(self._buffer) if end is None else end)
        if text:
            self._parts.append(Part("arguments", text, self._calls - 1))
        if end is not None:
            self._state = self._rest if self._form.in_object else self._between
        return end is not None

    def _rest(self, _: bool) -> bool:
        """Further members, as an id, up to the object's brace; models forget it before a mark."""
        ends = [self._buffer.find("}") + 1, *(self._buffer.find(mark) for mark in self._form.closings)]
        ends = [end for end in ends if end > 0]
        if not ends:
            self._take(len(self._buffer) - begun(self._buffer, self._form.closings))
            return False
        self._take(min(ends))
        self._state = self._between
        return True

    def _between(self, final: bool) -> bool:
        """After a call: space and closing marks are dropped."""
        filler = " \n\r\t,;]" if self._listed else " \n\r\t"
        self._take(len(self._buffer) - len(self._buffer.lstrip(filler)))
        for mark in self._form.closings:
            if self._buffer.startswith(mark):
                self._take(len(mark))
                return True
        if self._form.opening and self._buffer.startswith(self._form.opening):
            self._open()
            return True
        if self._listed and self._buffer.startswith("{"):
            self._opened, self._state = "", self._head
            return True
        marks = [*self._form.closings, self._form.opening]
        if not final and any(mark.startswith(self._buffer) for mark in marks):
            return False
        self._state = self._content
        return bool(self._buffer)

    def _open(self) -> None:
        self._opened = self._take(len(self._form.opening))
        self._state = self._head

    def _callable(self, name: str) -> bool:
        return bool(self._starts) or name in self._names

    def _begin(self, name: str) -> None:
        self._parts.append(Part("call", name, self._calls))
        self._calls += 1

    def _refuse(self, end: int) -> bool:
        """What was opened is no call: that and `end` characters are content."""
        self._say(self._opened + self._take(end))
        self._state = self._content
        return True

    def _say(self, text: str) -> None:
        """Content; white space at its end waits for more, and goes where a call begins or ends the answer."""
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if self._calls and not self._spoken:
            said = said.lstrip()
        if said:
            self._parts.append(Part("content", said))
            self._spoken = True

    def _take(self, size: int) -> str:
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken


class _ObjectEnd:
    """Where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False

    def scan(self, text: str) -> int | None:
        """The place after its last brace in `text`, which goes on from what was scanned before; None if not there."""
        for at, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._quoted = char != '"'
                self._escaped = char == "\\"
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None
