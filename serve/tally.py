"""What a relayed answer tells of itself, read from its bytes as they pass."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator

from serve.traffic import Answered


class Tally:
    """What an answer tells of itself: tokens and end. A model's text is never mistaken for it: its quotes are escaped.

    A stream that was not asked for its usage counts its events, which are tokens in most engines.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: float | None = None
        self._events = 0
        self._last = b"\n"
        """What came last, as a border between two chunks may cut what is looked for; an event begins a line."""
        self._tokens: dict[bytes, int] = {}
        self._finish = "cancelled"

    def feed(self, chunk: bytes) -> None:
        """The next bytes of it."""
        if self._first is None:
            self._first = time.monotonic() - self._began
        seen = self._last + chunk
        self._events += seen.count(b"\ndata: ") - self._last.count(b"\ndata: ")
        if b"_tokens" in seen:
            self._tokens |= {kind: int(count) for kind, count in _TOKENS.findall(seen)}
        for finish in _FINISH.findall(seen):
            self._finish = finish.decode()
        self._last = seen[-_LONGEST:]

    async def of(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The same chunks, fed."""
        async for chunk in chunks:
            self.feed(chunk)
            yield chunk

    def answered(self) -> Answered:
        """The sum of it."""
        tokens = self._tokens
        prompt = tokens.get(b"prompt", tokens.get(b"input", 0))
        new = tokens.get(b"completion", tokens.get(b"output", self._events))
        return Answered(prompt, new, self._finish, None, self._first, time.monotonic() - self._began)


_TOKENS = re.compile(rb'"(prompt|completion|input|output)_tokens":\s*(\d+)')
_FINISH = re.compile(rb'"finish_reason":\s*"(\w+)"')
_LONGEST = 64
"""Bytes that one of them has at most."""
