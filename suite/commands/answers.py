"""Streamed answers on a terminal: one as it comes, or several models' side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from suite.document import visible

Shown = Callable[["Answer", str, str], None]
"""Called with an answer, what its new piece is (text, reasoning or call), and the piece."""


@dataclass
class Answer:
    """What one model says to one question, growing while it is streamed."""

    model: str
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's turn, as later questions and saved conversations have it."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        return {"role": "assistant", "content": self.text, **calls}

    def add(self, delta: dict[str, Any], shown: Shown) -> None:
        """Take in the `delta` of an event."""
        if thought := delta.get("reasoning_content") or delta.get("reasoning"):
            self.reasoning += thought
            shown(self, "reasoning", thought)
        if said := delta.get("content"):
            self.text += said
            shown(self, "text", said)
        for part in delta.get("tool_calls") or ():
            index, function = part.get("index", 0), part.get("function") or {}
            while len(self.calls) <= index:
                self.calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
            call = self.calls[index]
            call["id"] = call["id"] or part.get("id") or ""
            for key in ("name", "arguments"):
                call["function"][key] += function.get(key) or ""

    def finish(self, shown: Shown) -> None:
        """Show what is known only at the end."""
        for call in self.calls:
            shown(self, "call", call_text(call))


def call_text(call: dict[str, Any]) -> str:
    """A tool call as a person reads it: `add({"a": 1})`."""
    return f"{call['function']['name']}({call['function']['arguments']})"


STYLES = {"reasoning": "dim", "call": "cyan"}


def terminal() -> Console:
    """A console that prints what models say as it is: no markup, no emoji codes, no colours of its own."""
    return Console(markup=False, highlight=False, emoji=False)


class Scroll:
    """One answer, piece after piece; reasoning dim, tool calls on lines of their own."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = ""

    def __call__(self, _: Answer, kind: str, piece: str) -> None:
        if (self._last and kind != self._last) or self._last == "call":
            self.console.print()
        self._last = kind
        self.console.print(visible(piece), style=STYLES.get(kind), end="", soft_wrap=True)

    def end(self) -> None:
        """Close the last line."""
        self.console.print()


@contextlib.contextmanager
def scrolling(console: Console) -> Iterator[Shown]:
    """Show one answer as it comes."""
    scroll = Scroll(console)
    try:
        yield scroll
    finally:
        scroll.end()


@contextlib.contextmanager
def beside(console: Console, answers: Sequence[Answer]) -> Iterator[Shown]:
    """Show answers in columns that grow at the same time; where no terminal is, one below the other at the end."""
    if not console.is_terminal:
        yield lambda *_: None
        for answer in answers:
            console.print(Text(f"[{answer.model}]", style="bold"))
            console.print(_whole(answer), soft_wrap=True)
        return
    with Live(console=console, transient=True, refresh_per_second=12) as live:
        yield lambda *_: live.update(_columns(answers, console, console.height - 4))
    console.print(_columns(answers, console, None))


def _columns(answers: Sequence[Answer], console: Console, height: int | None) -> Table:
    table = Table.grid(expand=True, padding=(0, 2))
    cells = []
    for answer in answers:
        table.add_column(ratio=1)
        whole = _whole(answer)
        lines = whole.wrap(console, max(10, console.width // len(answers) - 2))
        # while answers grow, their last lines are what there is to see
        cells.append(whole if height is None else Text("\n").join(lines[-height:]))
    table.add_row(*(Text(answer.model, style="bold") for answer in answers))
    table.add_row(*cells)
    return table


def _whole(answer: Answer) -> Text:
    parts = [(answer.reasoning, "dim"), (answer.text, ""), *((call_text(call), "cyan") for call in answer.calls)]
    parts.append((answer.error, "red"))
    return Text("\n").join(Text(visible(text), style=style) for text, style in parts if text)
