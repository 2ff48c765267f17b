"""Answers in the shapes of OpenAI's API, put together again by its own client."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from serve import forms
from serve.json_calls import HERMES, CallParser
from serve.protocol import UNSUPPORTED, ChatBody, CompletionBody
from serve.reply import ReasoningParser, Reply

CALLS = [("add", '{"a": 1, "b": 2}'), ("now", "{}"), ("add", '{"a": [3], "b": ""}')]
TEXT = "<think>Two sums.</think>Wait." + "".join(
    f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in CALLS
)


def chunk(delta: dict[str, Any], finish: str | None = None) -> ChatCompletionChunk:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    said = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return ChatCompletionChunk.model_validate(said, strict=True)


@given(st.lists(st.integers(1, 60), max_size=40))
def test_calls_in_pieces_are_put_together_by_the_client(sizes: list[int]) -> None:
    reply = Reply(ReasoningParser(("<think>", "</think>")), CallParser(HERMES, ["add", "now"]))
    state, rest = ChatCompletionStreamState(), TEXT
    state.handle_chunk(chunk({"role": "assistant", "content": ""}))
    for size in sizes:
        if delta := forms.chat_delta(reply.feed(rest[:size]), reply):
            state.handle_chunk(chunk(delta))
        rest = rest[size:]
    state.handle_chunk(chunk(forms.chat_delta(reply.feed(rest, final=True), reply), "tool_calls"))
    streamed: Any = state.get_final_completion().choices[0].message
    whole = forms.message(reply)
    calls = [(call.id, call.type, call.function.name, call.function.arguments) for call in streamed.tool_calls]
    assert calls == [(call["id"], call["type"], *call["function"].values()) for call in whole["tool_calls"]]
    assert [(name, arguments) for *_, name, arguments in calls] == CALLS
    assert (streamed.reasoning_content, streamed.content) == (whole["reasoning_content"], whole["content"])


def test_no_field_is_taken_and_refused() -> None:
    assert not UNSUPPORTED.keys() & (ChatBody.model_fields.keys() | CompletionBody.model_fields.keys())
