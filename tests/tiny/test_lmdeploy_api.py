"""What our gateway makes of requests for LMDeploy and of its answers, in the forms that version 0.18 was seen to give."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from serve.engines.lmdeploy_api import LmdeployApi, Vocabulary
from serve.errors import ApiError

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def api() -> LmdeployApi:
    return LmdeployApi(NANO, limit=512)


def chat(api: LmdeployApi, **more: Any) -> dict[str, Any]:
    return api.ask(CHAT, {"model": "nano", "messages": MESSAGES, **more})


def text(api: LmdeployApi, **more: Any) -> dict[str, Any]:
    return api.ask(TEXT, {"model": "nano", "prompt": "Who are", **more})


def test_a_chat_is_asked_with_the_models_sampling_and_not_with_lmdeploys(api: LmdeployApi) -> None:
    asked = chat(api, unknown=1)
    assert {name: asked[name] for name in ("temperature", "top_p", "top_k")} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }
    assert (asked["messages"], asked["unknown"]) == (MESSAGES, 1)
    cold = chat(api, temperature=1e-9, top_k=-1, seed=-1)
    assert (cold["temperature"], cold["top_k"], cold["seed"]) == (0, 0, 2**63 - 1)


def test_what_is_done_here_or_steers_its_cache_does_not_reach_it(api: LmdeployApi) -> None:
    asked = chat(api, stop=["x"], session_id=5, preserve_cache=True, migration_request={"x": 1}, presence_penalty=0)
    assert not {"stop", "session_id", "preserve_cache", "migration_request", "presence_penalty"} & asked.keys()


def test_fields_of_other_names(api: LmdeployApi) -> None:
    assert chat(api, min_tokens=3)["min_new_tokens"] == 3
    schema = {"type": "object"}
    assert chat(api, structured_outputs={"json": schema})["response_format"]["json_schema"]["schema"] == schema
    assert chat(api, structured_outputs={"choice": ["a.b", "c"]})["response_format"] == {
        "type": "regex_schema",
        "regex_schema": r"(a\.b)|(c)",
    }
    tool = {"type": "function", "function": {"name": "f"}}
    assert "tools" not in chat(api, tools=[tool], tool_choice="none")
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    assert chat(api, messages=[{"role": "user", "content": parts}])["messages"] == MESSAGES


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs"),
        ({"stop": "x", "min_tokens": 2}, "min_tokens"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        ({"temperature": "warm"}, "temperature"),
    ],
)
def test_chats_that_it_would_get_wrong_are_refused(api: LmdeployApi, more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(api, **more)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"n": 2}, "n"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": ["a", "b"], "stream": True}, "prompt"),
        ({"prompt": [0, 0, 2**20]}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
    ],
)
def test_texts_that_it_would_get_wrong_are_refused(api: LmdeployApi, more: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as refused:
        text(api, **more)
    assert (refused.value.status, refused.value.body["error"]["param"]) == (400, param)


def test_token_ids_are_asked_as_the_text_that_is_read_as_them(api: LmdeployApi) -> None:
    ids = Vocabulary(NANO).ids("Who are you?")
    assert text(api, prompt=ids)["prompt"] == "Who are you?"
    assert text(api, prompt=[ids, ids])["prompt"] == ["Who are you?"] * 2
    assert text(api)["max_tokens"] == 16


def test_errors(api: LmdeployApi) -> None:
    def error(message: str) -> dict[str, Any]:
        flat = {"message": message, "type": "invalid_request_error", "code": 400, "param": None, "object": "error"}
        found: dict[str, Any] = json.loads(api.error(400, json.dumps(flat).encode())[1])["error"]
        return found

    plain = error("no")
    assert plain == {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
    long = error("Input length (600) must be smaller than the model context length (512).")
    assert long["code"] == "context_length_exceeded"


def scored(*pieces: str) -> dict[str, Any]:
    """As it names tokens: by pieces of the vocabulary, the likeliest without the one that was taken."""
    others = [{"token": "!", "bytes": [33], "logprob": -2.0}]
    return {"content": [{"token": p, "bytes": [*p.encode()], "logprob": -1.0, "top_logprobs": others} for p in pieces]}


def whole(api: LmdeployApi, fields: dict[str, Any], **choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Who are you", "reasoning_content": None, "tool_calls": None}
    said = {"id": "chatcmpl-x", "model": "a@lora", "choices": [{"index": 0, "message": message, **choice}], "usage": {}}
    answer: dict[str, Any] = json.loads(api.answer(fields, json.dumps(said).encode()))
    return answer["choices"][0]


def test_a_whole_answer_is_cut_with_its_log_probabilities(api: LmdeployApi) -> None:
    pieces = [
        Tokenizer.from_file(str(NANO / "tokenizer.json")).id_to_token(i) for i in Vocabulary(NANO).ids("Who are you")
    ]
    got = whole(
        api, {"stop": " you", "top_logprobs": 1, "logprobs": True}, finish_reason="length", logprobs=scored(*pieces)
    )
    assert (got["message"]["content"], got["finish_reason"]) == ("Who are", "stop")
    assert "".join(entry["token"] for entry in got["logprobs"]["content"]) == "Who are"
    first = got["logprobs"]["content"][0]
    assert first["top_logprobs"] == [{k: first[k] for k in ("token", "logprob", "bytes")}]
    assert bytes(first["bytes"]).decode() == first["token"]


def test_a_whole_answer_without_a_stop_string_stays(api: LmdeployApi) -> None:
    got = whole(api, {"stop": ["nowhere"]}, finish_reason="stop", output_ids=[1, 2])
    assert (got["message"]["content"], got["finish_reason"], got["token_ids"]) == ("Who are you", "stop", [1, 2])


class Stream:
    """A stream of LMDeploy's, and how much of it was read."""

    def __init__(self, events: list[Any]) -> None:
        self.raw = b"".join(f"data: {e if e == '[DONE]' else json.dumps(e)}\n\n".encode() for e in events)
        self.read = 0

    async def chunks(self, size: int) -> AsyncIterator[bytes]:
        for first, last in itertools.pairwise([*range(0, len(self.raw), size), len(self.raw)]):
            self.read = last
            yield self.raw[first:last]

    def through(self, api: LmdeployApi, fields: dict[str, Any], size: int = 7) -> list[Any]:
        async def gather() -> bytes:
            return b"".join([chunk async for chunk in api.stream(fields, self.chunks(size))])

        events = asyncio.run(gather()).decode().split("\n\n")[:-1]
        return [e if e == "data: [DONE]" else json.loads(e.removeprefix("data: ")) for e in events]


def delta(content: str, index: int = 0, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"role": "assistant", "content": content}, **more}
    return {"id": "x", "object": "chat.completion.chunk", "model": "a", "choices": [choice]}


USAGE = {"id": "x", "object": "chat.completion.chunk", "model": "a", "choices": [], "usage": {"prompt_tokens": 3}}


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_stream_is_cut_and_read_no_further(api: LmdeployApi, size: int) -> None:
    stream = Stream([delta("one S"), delta("T"), delta("OP two"), *[delta("more")] * 50, "[DONE]"])
    *events, last = stream.through(api, {"stop": "STOP", "stream": True}, size)
    assert last == "data: [DONE]"
    assert "".join(e["choices"][0]["delta"]["content"] for e in events) == "one "
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, "stop"]
    assert stream.read < len(stream.raw) / 4 or size > len(stream.raw)


def test_the_usage_of_a_cut_stream_is_waited_for(api: LmdeployApi) -> None:
    events = [delta("STOP"), delta("more"), delta("", finish_reason="length"), USAGE, "[DONE]"]
    got = Stream(events).through(api, {"stop": "STOP", "stream_options": {"include_usage": True}})
    assert [e if isinstance(e, str) else bool(e["choices"]) for e in got] == [True, False, "data: [DONE]"]


def test_what_was_held_back_comes_with_the_end(api: LmdeployApi) -> None:
    events = [delta("ST", 0), delta("a STOP b", 1), delta("", 0, finish_reason="length"), delta("c", 1), "[DONE]"]
    got = Stream(events).through(api, {"stop": "STOP", "n": 2})
    texts: dict[int, str] = {0: "", 1: ""}
    for event in got[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
    assert texts == {0: "ST", 1: "a "}


def test_an_error_in_a_stream_and_half_an_event_before_it(api: LmdeployApi) -> None:
    stream = Stream([delta("one")])
    flat = {"message": "out of memory", "type": "server_error", "code": 500, "param": None, "object": "error"}
    stream.raw += b'data: {"id": \n\n' + f"data: {json.dumps({'error': flat})}\n\ndata: [DONE]\n\n".encode()
    got = stream.through(api, {})
    assert got[1]["error"] == {"message": "out of memory", "type": "server_error", "param": None, "code": None}
    assert got[2] == "data: [DONE]"


def test_events_of_other_routes_stay_as_they_are(api: LmdeployApi) -> None:
    stream = Stream([])
    stream.raw = b'event: response.created\ndata: {"response": {"model": "a"}}\n\ndata: [DONE]\n\n'

    async def gather() -> bytes:
        return b"".join([chunk async for chunk in api.stream({}, stream.chunks(5))])

    assert asyncio.run(gather()) == stream.raw
