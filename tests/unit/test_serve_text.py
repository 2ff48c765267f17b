"""Text from tokens: the same whatever the token borders are, and cut before a stop string."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes: the hardest borders there are."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@dataclass
class Chunks:
    """A tokenizer with one token for each given piece of text."""

    pieces: list[str]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


def streamed(stream: TextStream, tokens: list[int]) -> str:
    shown = ""
    for token in tokens:
        ended = stream.push(token)
        shown += stream.take()
        if ended:
            break
    stream.finish()
    return shown + stream.take(final=True)


texts = st.text(st.characters(codec="utf-8"), max_size=40)


@given(texts)
def test_bytes_become_the_text_again(text: str) -> None:
    assert streamed(TextStream(Bytes()), list(text.encode())) == text


@given(st.binary(max_size=60), st.data())
def test_several_tokens_at_once_become_the_text_of_one_after_the_other(raw: bytes, data: st.DataObject) -> None:
    stream, rest = TextStream(Bytes(), hidden={0}), list(raw)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        stream.extend(rest[:size])
        rest = rest[size:]
    stream.finish()
    assert stream.text == raw.replace(b"\0", b"").decode("utf-8", "replace")
    assert stream.text == streamed(TextStream(Bytes(), hidden={0}), list(raw))


@given(texts)
def test_no_character_is_shown_before_it_is_whole(text: str) -> None:
    stream, shown = TextStream(Bytes()), ""
    for token in text.encode():
        stream.push(token)
        shown += stream.take()
        assert text.startswith(shown)


@settings(max_examples=120)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3), st.data())
def test_stop_strings_are_found_across_borders_and_never_shown(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    pieces, rest = [], text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        pieces.append(rest[:size])
        rest = rest[size:]
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    cut = min(ends)[1] if ends else len(text)
    stream = TextStream(Chunks(pieces), stops)
    assert streamed(stream, list(range(len(pieces)))) == text[:cut]
    assert stream.stopped == bool(ends)


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(Chunks(["Hello ", "<en", "d>", "!"]), ["<end>"])
    assert [stream.push(token) for token in (0, 1)] == [False, False]
    assert stream.take() == "Hello "
    assert stream.push(2)
    assert stream.take() == ""


def test_stop_strings_within_the_first_tokens_do_not_count() -> None:
    tokens, stops = list(b"abcabcab"), ["c", "ab"]
    assert [streamed(TextStream(Bytes(), stops, min_tokens=n), tokens) for n in (0, 1, 2, 3, 8)] == [
        "", "", "ab", "abc", "abcabcab",
    ]  # fmt: skip


def test_hidden_tokens_have_no_text() -> None:
    assert streamed(TextStream(Chunks(["a", "<eos>", "b"]), hidden={1}), [0, 1, 2]) == "ab"


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    assert streamed(TextStream(Bytes()), list("é".encode()[:1])) == "\ufffd"
