"""Calls of tools in the text of an answer, found as the text comes: what is common to all forms of them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serve.text import begun

MARK = re.compile(r"<[^<>\s][^<>]*>|\[/?[A-Z_]+\]")
"""What most templates mark with: tags, or words in square brackets."""


@dataclass(frozen=True)
class Part:
    """A piece of an answer: of its reasoning, its content, or the arguments of its call number `call`.

    Of kind "call" it begins that call, and `text` is the name of the function.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    call: int = 0


class Calls(ABC):
    """Tells calls of tools from content; the parts do not depend on where the text is cut into pieces.

    content ──opening──> head ──its name──> arguments ──> between ──next call──> head
       ^                  └─ no call: it is content          │
       └───────── anything but space and closing marks ──────┘

    A call counts from its name on, so that it can be shown as it comes; what is cut off later stays a call, as with
    OpenAI. White space around calls is dropped. What a call looks like is said by subclasses.
    """

    def __init__(self, section: str, opening: str) -> None:
        self._opening = opening
        self._starts = [mark for mark in (section, opening) if mark]
        self._buffer = ""  # not told apart yet
        self._opened = ""  # the mark before it, which is content should no call follow
        self._space = ""  # white space at the end of the content so far
        self._spoken = False
        self._calls = 0
        self._parts: list[Part] = []
        self._state: Callable[[bool], bool] = self._content

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain now; `final` says that no more text comes."""
        self._buffer += text
        while self._state(final):
            pass
        if final and self._space and not self._calls:
            self._parts.append(Part("content", self._space))
        parts, self._parts = self._parts, []
        return parts

    @abstractmethod
    def _head(self, final: bool) -> bool:
        """After the opening mark; whether the state has changed, here as in all states."""

    @abstractmethod
    def _between(self, final: bool) -> bool:
        """After a call."""

    def _content(self, final: bool) -> bool:
        places = [(at, mark) for mark in self._starts if (at := self._buffer.find(mark)) >= 0]
        if not places:
            self._say(self._take(len(self._buffer) - (0 if final else begun(self._buffer, self._starts))))
            return False
        at, mark = min(places)
        self._say(self._take(at))
        if mark == self._opening:
            self._open()
        else:
            self._take(len(mark))
            self._state = self._between
        return True

    def _open(self) -> None:
        self._opened = self._take(len(self._opening))
        self._state = self._head

    def _begin(self, name: str) -> None:
        self._parts.append(Part("call", name, self._calls))
        self._calls += 1

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(Part("arguments", text, self._calls - 1))

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
