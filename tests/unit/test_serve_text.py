"""Text from tokens: the same whatever the token borders are, cut before a stop string, with its tool calls found."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.text import TextStream, tool_calls


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


def test_hidden_tokens_have_no_text() -> None:
    assert streamed(TextStream(Chunks(["a", "<eos>", "b"]), hidden={1}), [0, 1, 2]) == "ab"


def test_a_broken_character_at_the_end_is_shown_as_such() -> None:
    assert streamed(TextStream(Bytes()), list("é".encode()[:1])) == "\ufffd"


arguments = st.dictionaries(
    st.text(max_size=5), st.one_of(st.text(), st.integers(), st.lists(st.booleans())), max_size=3
)


@given(st.lists(st.tuples(st.text(min_size=1), arguments), min_size=1, max_size=3))
def test_tool_calls_come_back(calls: list[tuple[str, dict[str, object]]]) -> None:
    if any("tool_call>" in json.dumps(call, ensure_ascii=False) for call in calls):
        return
    blocks = [json.dumps({"name": name, "arguments": args}, ensure_ascii=False) for name, args in calls]
    content, found = tool_calls("Wait.\n" + "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks))
    assert content == "Wait."
    assert [(call["name"], json.loads(call["arguments"])) for call in found] == calls


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "<tool_call>{broken</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert tool_calls(text) == (text, [])


def test_a_call_without_its_end_counts() -> None:
    assert tool_calls('<tool_call>{"name": "f", "arguments": "{}"}') == ("", [{"name": "f", "arguments": "{}"}])
