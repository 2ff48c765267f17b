"""From tokens to text as they come: no broken characters, and nothing of a stop string. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

BROKEN = "\ufffd"
CONTEXT = 8
"""Tokens that are decoded again with each new one, at least: more than any character has bytes."""


class TextStream:
    """The text of one answer. `push` tokens in one thread, `take` what may be shown in another.

    `hidden` tokens have no text. A stop string may lie across any token borders; the text ends before it, but not
    with one of the first `min_tokens` tokens.
    """

    def __init__(
        self, tokenizer: Any, stops: Sequence[str] = (), hidden: Collection[int] = (), min_tokens: int = 0
    ) -> None:
        self.tokenizer, self.stops, self.hidden = tokenizer, [stop for stop in stops if stop], hidden
        self._decode = plain_decode(tokenizer)
        self._early = min_tokens
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
        self._early = max(0, self._early - 1)
        return self.stopped

    def extend(self, tokens: Iterable[int]) -> None:
        """Add several tokens at the cost of one; only for an answer without stop strings, which may end at any."""
        self._ids += [token for token in tokens if token not in self.hidden]
        self._extend(final=False)

    def finish(self) -> None:
        """No more tokens come: what was an incomplete character is shown as it is."""
        if not self.stopped:
            self._extend(final=True)

    def take(self, final: bool = False) -> str:
        """Text that is new since the last call; what may become a stop string is held back until `final`."""
        end = len(self.text) - (0 if final or self.stopped else begun(self.text, self.stops))
        new = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return new

    def _extend(self, final: bool) -> None:
        # the few ids before give a token's text its context (spaces, joined bytes) at a cost that does not grow
        longer = self._decode(self._ids[self._from :])
        if len(longer) > len(self._known) and (final or not longer.endswith(BROKEN)):
            self._append(longer[len(self._known) :])
            self._known = longer
            if len(self._ids) - self._from > 2 * CONTEXT:
                self._from = len(self._ids) - CONTEXT
                self._known = self._decode(self._ids[self._from :])

    def _append(self, new: str) -> None:
        if not self.stops:
            self.text += new
            return
        start = len(self.text)
        text = self.text + new
        places = ((text.find(stop, max(0, start - len(stop) + 1)), len(stop)) for stop in self.stops)
        found = [(at + length, at) for at, length in places if at >= 0 and not self._early]
        # the one that is complete first, or the answer would depend on where its tokens begin
        self.text = text[: min(found)[1]] if found else text
        self.stopped = bool(found)


def plain_decode(tokenizer: Any) -> Callable[[list[int]], str]:
    """`tokenizer.decode` without what transformers does around it, which takes several times as long."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.clean_up_tokenization_spaces:
        decode: Callable[[list[int]], str] = tokenizer.decode
        return decode
    return partial(backend.decode, skip_special_tokens=False)


def plain_encode(tokenizer: Any) -> Callable[[str, bool], list[int]]:
    """Token ids of a text, with special ones around it or not, without what transformers does around that."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or tokenizer.split_special_tokens:
        return lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if backend.truncation or backend.padding:  # written in some files, and not heeded by transformers either
        backend.no_truncation()
        backend.no_padding()
    # of a batch of one, because that lets other threads run meanwhile
    return lambda text, special: list(backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)


def begun(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`.

    >>> begun("Hello <to", ["<tool_call>"])
    3
    """
    marks = [*marks]
    sizes = range(min(max(map(len, marks), default=1) - 1, len(text)), 0, -1)
    return next((size for size in sizes if any(mark.startswith(text[-size:]) for mark in marks)), 0)


def special_ids(tokenizer: Any, keep: Collection[str] = ()) -> frozenset[int]:
    """The tokens that have no place in an answer's text, all but those written as one of `keep`."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(number for number, token in added if token.special and token.content not in keep)
