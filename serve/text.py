"""From tokens to text as they come: no broken characters, and nothing of a stop string. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

BROKEN = "\ufffd"
CONTEXT = 8
"""Tokens that are decoded again with each new one, at least: more than any character has bytes."""
TOOL_CALL = ("<tool_call>", "</tool_call>")


class TextStream:
    """The text of one answer. `push` tokens in one thread, `take` what may be shown in another.

    `hidden` tokens have no text. A stop string may lie across any token borders; the text ends before it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), hidden: Collection[int] = ()) -> None:
        self.tokenizer, self.stops, self.hidden = tokenizer, [stop for stop in stops if stop], hidden
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        self._from, self._known = 0, ""  # the ids from there on gave this text so far, the last part of `text`
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; True once a stop string has been found."""
        if token not in self.hidden and not self.stopped:
            self._ids.append(token)
            self._extend(final=False)
        return self.stopped

    def finish(self) -> None:
        """No more tokens come: what was an incomplete character is shown as it is."""
        if not self.stopped:
            self._extend(final=True)

    def take(self, final: bool = False) -> str:
        """Text that is new since the last call; what may become a stop string is held back until `final`."""
        end = len(self.text) if final or self.stopped else len(self.text) - self._held()
        new = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return new

    def _extend(self, final: bool) -> None:
        # the few ids before give a token's text its context (spaces, joined bytes) at a cost that does not grow
        longer = self.tokenizer.decode(self._ids[self._from :])
        if len(longer) > len(self._known) and (final or not longer.endswith(BROKEN)):
            self._append(longer[len(self._known) :])
            self._known = longer
            if len(self._ids) - self._from > 2 * CONTEXT:
                self._from = len(self._ids) - CONTEXT
                self._known = self.tokenizer.decode(self._ids[self._from :])

    def _append(self, new: str) -> None:
        start = len(self.text)
        text = self.text + new
        places = ((text.find(stop, max(0, start - len(stop) + 1)), len(stop)) for stop in self.stops)
        found = [(at + length, at) for at, length in places if at >= 0]
        # the one that is complete first, or the answer would depend on where its tokens begin
        self.text = text[: min(found)[1]] if found else text
        self.stopped = bool(found)

    def _held(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        text = self.text
        longest = max(map(len, self.stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


def special_ids(tokenizer: Any, keep: Collection[str] = ()) -> frozenset[int]:
    """The tokens that have no place in an answer's text, all but those written as one of `keep`."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special and token.content not in keep)


def tool_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """Split an answer in Hermes form into its content and its calls, each `{"name", "arguments": JSON text}`.

    What is no well-formed call stays in the content.

    >>> tool_calls('Wait.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    ('Wait.', [{'name': 'add', 'arguments': '{"a": 1}'}])
    """
    content, calls, at = "", [], 0
    while (start := text.find(TOOL_CALL[0], at)) >= 0:
        end = text.find(TOOL_CALL[1], start)
        inside = text[start + len(TOOL_CALL[0]) : end if end >= 0 else len(text)]
        after = end + len(TOOL_CALL[1]) if end >= 0 else len(text)
        call = _call(inside)
        content += text[at:start] if call else text[at:after]
        calls += [call] if call else []
        at = after
    return (content + text[at:]).strip() if calls else text, calls


def _call(text: str) -> dict[str, str] | None:
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    return {
        "name": call["name"],
        "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    }
