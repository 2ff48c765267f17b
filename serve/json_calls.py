"""Calls of tools whose arguments are JSON: their form in a template, and finding them in the text of an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from serve.calls import MARK, Calls
from serve.text import begun
from suite.chat import common_suffix

_MEMBERS = re.compile(
    r'\s*\[?\s*\{\s*(?:"\w+"\s*:\s*"[^"\\]*"\s*,\s*){0,2}?"(?:\w+_)?name"\s*:\s*"(?P<name>[^"\\]+)"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""An object up to the brace of its arguments; two members may come before the name, as `"type": "function"` does."""
_NAMED = re.compile(r"\s*(?P<name>[^\s<>\[\]{}()\"`]+)[^{}]{0,80}?(?=\{)")
"""A name and marks up to the brace of the arguments."""
_OBJECT = re.compile(r'(\[?)\s*\{[^{}]*"\w*name":\s*"$')
_LONGEST_HEAD = 256


@dataclass(frozen=True)
class CallForm:
    """What a template writes around the names and JSON arguments of calls.

    first NAME middle ARGUMENTS between NAME middle ARGUMENTS last; `between` is None where a turn has one call only.
    """

    first: str
    middle: str
    between: str | None
    last: str

    @property
    def in_object(self) -> bool:
        """Whether name and arguments are members of one JSON object."""
        return bool(_OBJECT.search(self.first))

    @property
    def in_list(self) -> bool:
        """Whether calls are the elements of one JSON list."""
        found = _OBJECT.search(self.first)
        return bool(found and found[1])

    @property
    def section(self) -> str:
        """The mark that stands once before all calls, "" where each has only its own."""
        return "" if self.in_object else self.first.removesuffix(self.opening).strip()

    @property
    def opening(self) -> str:
        """The mark before each call, or before their list; "" where nothing marks calls."""
        if self.in_object:
            return _OBJECT.sub("", self.first).strip()
        return common_suffix(self.first, self.between or self.first).lstrip("> \n")

    @property
    def closings(self) -> tuple[str, ...]:
        """The marks that may follow a call."""
        after = (self.between or "").removesuffix(self.opening) + self.last
        found = [*MARK.findall(after), *re.findall("```", after)]
        return tuple(dict.fromkeys(mark for mark in found if mark not in self.first))

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks of the form."""
        return tuple(MARK.findall(" ".join((self.first, self.middle, self.between or "", self.last))))


HERMES = CallForm(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>"
)
"""What a model is made to write where calls are required and its template shows no form of its own."""


class CallParser(Calls):
    """Calls whose arguments are JSON, in `form`.

    Where nothing marks calls they stand at the beginning of an answer, and only `names` can be called.
    """

    def __init__(self, form: CallForm, names: Collection[str]) -> None:
        super().__init__(form.section, form.opening)
        self._form, self._names = form, names
        self._listed = form.in_list or not self._starts
        self._refusals = [mark for mark in form.closings if mark not in form.middle]
        self._object = _ObjectEnd()
        if not self._starts:
            self._state = self._head

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
        self._argue(as_text)
        self._take(end)
        self._state = self._between
        return True

    def _arguments(self, _: bool) -> bool:
        end = self._object.scan(self._buffer)
        self._argue(self._take(len(self._buffer) if end is None else end))
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

    def _callable(self, name: str) -> bool:
        return bool(self._starts) or name in self._names


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
