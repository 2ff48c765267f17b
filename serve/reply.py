"""An answer's text told apart, as it comes, into what OpenAI's messages keep apart: reasoning, content and calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.calls import Calls, Part
from serve.text import begun


@dataclass
class Call:
    """One call of a tool; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:9])
    """Nine letters and digits, because Mistral's templates take no other."""


class ReasoningParser:
    """Tells the reasoning at the beginning of an answer, between `marks`, from the rest.

    `inside` says that the prompt has opened it already. White space around it is dropped.
    """

    def __init__(self, marks: tuple[str, str], inside: bool = False) -> None:
        self._opening, self._closing = marks
        self._buffer = ""
        self._state: Callable[[bool], list[Part]] = self._reasoning if inside else self._start
        self._begun = False

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain now; `final` says that no more text comes."""
        self._buffer += text
        return self._state(final)

    def _start(self, final: bool) -> list[Part]:
        text = self._buffer.lstrip()
        if text.startswith(self._opening):
            self._buffer = text.removeprefix(self._opening)
            self._state = self._reasoning
            return self._reasoning(final)
        if not final and self._opening.startswith(text):
            return []
        return self._rest(final)

    def _reasoning(self, final: bool) -> list[Part]:
        text, found, after = self._buffer.partition(self._closing)
        held = 0 if found or final else begun(text, [self._closing])
        told = text[: len(text) - held].rstrip()
        self._buffer = text[len(told) :]
        if not self._begun:
            told = told.lstrip()
            self._begun = bool(told)
        parts = [Part("reasoning", told)] if told else []
        if found:
            self._buffer = after
            self._state = self._space
            parts += self._space(final)
        return parts

    def _space(self, final: bool) -> list[Part]:
        self._buffer = self._buffer.lstrip()
        return self._rest(final) if self._buffer else []

    def _rest(self, _: bool) -> list[Part]:
        text, self._buffer = self._buffer, ""
        self._state = self._rest
        return [Part("content", text)] if text else []


class Reply:
    """One answer, fed with its text in pieces; `parallel` False drops all calls but the first."""

    def __init__(
        self, thinking: ReasoningParser | None = None, calling: Calls | None = None, parallel: bool = True
    ) -> None:
        self._thinking, self._calling, self._parallel = thinking, calling, parallel
        self.reasoning = ""
        self.content = ""
        self.calls: list[Call] = []

    def feed(self, text: str, final: bool = False) -> list[Part]:
        """The parts that are certain now; `final` says that no more text comes."""
        parts = self._thinking.feed(text, final) if self._thinking else [Part("content", text)] if text else []
        if self._calling:
            spoken = "".join(part.text for part in parts if part.kind == "content")
            parts = [*(part for part in parts if part.kind != "content"), *self._calling.feed(spoken, final)]
        if not self._parallel:
            parts = [part for part in parts if part.call == 0]
        for part in parts:
            self._add(part)
        return parts

    def _add(self, part: Part) -> None:
        if part.kind == "reasoning":
            self.reasoning += part.text
        elif part.kind == "content":
            self.content += part.text
        elif part.kind == "call":
            self.calls.append(Call(part.text))
        else:
            self.calls[part.call].arguments += part.text
