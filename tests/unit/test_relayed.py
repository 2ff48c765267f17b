"""What the relay changes in bytes, what it reads in them, and how the probe judges answers."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engines.fleet import Loaded
from serve.engines.kind import flags
from serve.engines.translation import AsIs, JoinedText, openai_error
from serve.engines.vllm import Vllm
from serve.probe import Heard, Known, ParityProbe, Token, compare, distance
from serve.relay import _failure, _head, _limited, _renamed, _unbroken
from serve.replicas import Replica
from serve.settings import Settings
from serve.tally import Tally
from serve.traffic import Answered
from suite.errors import SuiteError

NAMES = (b'"model":"a@2"', b'"model":"a"')


async def pieces(whole: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    places = sorted({0, *(cut % (len(whole) + 1) for cut in cuts), len(whole)})
    for first, last in itertools.pairwise(places):
        yield whole[first:last]


def gathered(chunks: AsyncIterator[bytes]) -> bytes:
    async def gather() -> bytes:
        return b"".join([chunk async for chunk in chunks])

    return asyncio.run(gather())


@settings(max_examples=40)
@given(st.lists(st.text(), max_size=6), st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([":", ": "]))
def test_a_renamed_stream_does_not_depend_on_where_it_is_cut(texts: list[str], cuts: list[int], colon: str) -> None:
    texts += ['"model":"a@2"']  # what a model says is never renamed
    events = [json.dumps({"model": "a@2", "text": text}, separators=(",", colon)) for text in texts]
    whole = b"".join(f"data: {event}\n\n".encode() for event in events) + b"data: [DONE]\n\n"
    got = gathered(_renamed(pieces(whole, cuts), NAMES))
    read = [json.loads(event[6:]) for event in got.decode().split("\n\n")[:-2]]
    assert read == [{"model": "a", "text": text} for text in texts]


def test_every_piece_of_a_stream_is_a_sign_of_life() -> None:
    replica = Replica("a")
    assert gathered(_unbroken(b"a", pieces(b"", []), replica)) == b"a"
    assert not replica.heard
    assert gathered(_unbroken(b"a", pieces(b"bc", [1]), replica)) == b"abc"
    assert replica.heard


def test_an_answer_tells_its_tokens_and_no_text_of_a_model_does() -> None:
    tally = Tally()
    text = '"finish_reason":"error" "prompt_tokens":99'
    answer = {
        "choices": [{"text": text, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7},
    }
    tally.feed(json.dumps(answer, separators=(",", ":")).encode())
    found = tally.answered()
    assert (found.prompt_tokens, found.new_tokens, found.finish) == (5, 7, "stop")
    streamed = Tally()
    for _ in range(3):
        streamed.feed(b'data: {"choices":[{"finish_reason":null}]}\n\n')
    assert (streamed.answered().new_tokens, streamed.answered().finish) == (3, "cancelled")


@settings(max_examples=40)
@given(st.integers(0, 99_999), st.lists(st.text(), max_size=4), st.lists(st.integers(0, 10_000), max_size=12))
def test_what_a_stream_tells_does_not_depend_on_where_it_is_cut(count: int, texts: list[str], cuts: list[int]) -> None:
    texts += ['\ndata: "completion_tokens":7 "finish_reason":"x"']
    events = [{"choices": [{"text": text, "finish_reason": None}]} for text in texts]
    end = {"choices": [{"finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": count}}
    whole = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in [*events, end])

    def told(stream: bytes) -> Answered:
        tally = Tally()
        assert gathered(tally.of(pieces(stream, cuts))) == stream
        return tally.answered()

    found = told(whole)
    assert (found.prompt_tokens, found.new_tokens, found.finish) == (3, count, "stop")
    uncounted = told(whole[: whole.index(b'data: {"choices": [{"finish_reason": "stop"}')])
    assert (uncounted.new_tokens, uncounted.finish) == (len(events), "cancelled")


ERROR = {"error": {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": 500}}


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (ERROR, 500),
        ({"error": {**ERROR["error"], "code": 400}}, 400),
        ({"type": "error", "error": {"message": "odd", "code": "odd"}}, 500),
        ({"error": "in words"}, 500),
        ({"error": None, "choices": []}, None),
        ({"choices": [{"delta": {"content": '{"error"'}}]}, None),
        ({"response": {"error": "of its own"}}, None),
    ],
)
def test_a_stream_that_begins_with_an_error_is_one(event: dict[str, Any], wanted: int | None, end: str) -> None:
    whole = f": ping{end}event: x\ndata: {json.dumps(event)}{end}data: [DONE]{end}".encode()
    for cuts in ([], [3], [*range(len(whole))]):
        found = _failure(asyncio.run(_head(pieces(whole, cuts))))
        assert (found and (found[0], json.loads(found[1]))) == (wanted and (wanted, event))


@pytest.mark.parametrize(
    ("path", "fields", "most", "wanted"),
    [
        ("/v1/completions", {"max_tokens": 5}, None, {"max_tokens": 5}),
        ("/v1/completions", {"max_tokens": 5}, 8, {"max_tokens": 5}),
        ("/v1/completions", {"max_tokens": 50}, 8, {"max_tokens": 8}),
        ("/v1/chat/completions", {}, 8, {"max_completion_tokens": 8}),
        ("/v1/chat/completions", {"max_tokens": "many"}, 8, {"max_tokens": 8}),
        ("/v1/embeddings", {}, 8, {}),
    ],
)
def test_answers_are_limited(path: str, fields: dict[str, Any], most: int | None, wanted: dict[str, Any]) -> None:
    assert _limited(path, fields, most) == wanted


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (404, b'{"detail":"Not Found"}', (404, "Not Found", "invalid_request_error", None)),
        (401, b'{"error":"Unauthorized"}', (401, "Unauthorized", "invalid_request_error", None)),
        (500, b"Internal Server Error", (500, "Internal Server Error", "server_error", None)),
        (502, b"", (502, "the engine gave no reason", "server_error", None)),
        (
            400,
            b'{"object":"error","message":"no model","type":"invalid_request_error","code":400}',
            (400, "no model", "invalid_request_error", None),
        ),
        (
            400,
            b'{"error":{"message":"too long","type":"BadRequestError","param":"input_tokens","code":400}}',
            (400, "too long", "BadRequestError", "input_tokens"),
        ),
        (
            422,
            b'{"detail":[{"loc":["body","messages"],"msg":"Field required"}]}',
            (400, "messages: Field required", "invalid_request_error", None),
        ),
    ],
)
def test_errors_of_other_forms(status: int, body: bytes, wanted: tuple[int, str, str, str | None]) -> None:
    got, raw = openai_error(status, body)
    error = json.loads(raw)["error"]
    assert (got, error["message"], error["type"], error["param"]) == wanted
    assert error["code"] is None


@pytest.mark.parametrize("code", [b"null", b'"model_not_found"'])
def test_openais_own_errors_stay_as_they_are(code: bytes) -> None:
    body = b'{"error": {"message":"m",  "type":"t","param":null,"code":%b}}' % code
    assert openai_error(422, body) == (422, body)


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for() -> None:
    said = {"message": "This model's maximum context length is 8 tokens.", "type": "t", "param": None, "code": 400}
    for body in (said, {"error": said}):
        assert json.loads(openai_error(400, json.dumps(body).encode())[1])["error"]["code"] == "context_length_exceeded"


def test_only_lists_of_nothing_but_text_are_joined() -> None:
    text = {"type": "text", "text": "a"}
    fields = {
        "messages": [
            {"role": "user", "content": [text, text]},
            {"role": "user", "content": [text, {"type": "image_url"}]},
        ]
    }
    asked = JoinedText().ask("/v1/chat/completions", fields)
    assert [message["content"] for message in asked["messages"]] == ["aa", fields["messages"][1]["content"]]
    assert AsIs().ask("/", fields) is fields
    for odd in ({}, {"messages": "x"}, {"messages": [1, {"content": None}]}):
        assert JoinedText().ask("/", odd) is odd


def test_options_as_a_command_line() -> None:
    assert flags({"a_b": 1, "c": True, "--d": False, "e": "x y"}) == ["--a-b", "1", "--c", "--no-d", "--e", "x y"]


def known(*tokens: tuple[int, float], **more: Any) -> Known:
    answer = [Token(token, logprob, {token: logprob, 7: logprob - 0.5}) for token, logprob in tokens]
    return Known("Who?", more.get("prompt", [1, 2]), answer)


def heard(*tokens: tuple[int, float], prompt: list[int] | None = None) -> Heard:
    return Heard(prompt, len(prompt or [1, 2]), list(tokens))


def test_an_offered_adapter_that_is_served_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.envs.device", lambda: "cpu")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "adapter_config.json").touch()
    once = Settings(model=tmp_path, lora_dir=[str(tmp_path)])
    again = Settings(model=tmp_path, lora_dir=[str(tmp_path)], adapters={"d": tmp_path / "d"})
    assert Vllm().room(again) == Vllm().room(once)


def test_distance() -> None:
    ours = known((3, -1.0), (4, -2.0)).answer
    assert distance([(3, -1.0), (4, -2.0)], ours) == 0
    assert distance([(3, -1.25), (4, -2.0)], ours) == 0.25
    assert distance([(3, -1.0), (7, -2.1), (9, -50.0)], ours) == 0.5  # what follows a near tie says nothing
    assert distance([(3, -1.0), (8, -2.0)], ours) == float("inf")
    assert distance([(3, -1.0)], ours) == float("inf")


class Echo:
    """An engine that answers as ours does, but for what is `changed` in its choices."""

    translation = AsIs()

    def __init__(self, **changed: Any) -> None:
        self.changed = changed

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        ours = known((3, -1.0 if body["model"] == "base" else -1.2))
        content = [{"logprob": token.logprob} for token in ours.answer]
        choice = {"logprobs": {"content": content}, "token_ids": [3], "finish_reason": "length", **self.changed}
        return 200, {"choices": [choice], "prompt_token_ids": ours.prompt, "usage": {"prompt_tokens": 2}}


@pytest.mark.parametrize(
    "changed",
    [
        {"logprobs": None},
        {"logprobs": {"content": [{"logprob": None}]}},
        {"token_ids": None},
        {"token_ids": [3, 4]},
        {"logprobs": {"content": [{}]}},
    ],
)
def test_an_engine_that_does_not_tell_what_the_probe_needs_is_refused(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.probe.references", lambda *_: {"": [known((3, -1.0))]})
    probe = ParityProbe(Path("model"), "base", exact=True)
    with pytest.raises(SuiteError, match="tells the probe no token ids with log probabilities") as refused:
        asyncio.run(probe(Echo(**changed), {}))  # type: ignore[arg-type]
    assert "--no-probe" in refused.value.hint


@pytest.mark.parametrize("exact", [True, False])
def test_the_probe_says_what_it_cannot_see(
    exact: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    references = {"": [known((3, -1.0))], "a": [known((3, -1.2))]}
    monkeypatch.setattr("serve.probe.references", lambda *_: references)
    probe = ParityProbe(Path("model"), "base", exact=exact)
    asyncio.run(probe(Echo(), {"a": Loaded("a", Path("a"))}))  # type: ignore[arg-type]
    assert ("'a' is heeded: it changes log probabilities by 0.2 at most" in caplog.text) == (not exact)


def test_the_probe_tells_what_is_wrong() -> None:
    base, tuned = known((3, -1.0)), known((3, -1.2))
    compare("a", [heard((3, -1.21))], [tuned], [base], 0.05)
    compare("a", [heard((3, -1.2005))], [tuned], [tuned], 0.05)  # an adapter that changes nothing here either
    with pytest.raises(SuiteError, match=r"'a' has no effect in this engine(.|\n)*engine 3 \(-1.000\)"):
        compare("a", [heard((3, -1.0))], [tuned], [base], 0.4)
    with pytest.raises(SuiteError, match=r"answers otherwise than in our engine: log probabilities differ by 0.2"):
        compare("base", [heard((3, -1.2))], [base], None, 0.05)
    with pytest.raises(SuiteError, match=r"from place 1 on:\n  ours   \[1, 2\]\n  engine \[1, 9\]"):
        compare("base", [heard((3, -1.0), prompt=[1, 9])], [base], None, 0.05)
    with pytest.raises(SuiteError, match="reads 3 tokens for 'Who\\?', and was made for 2"):
        compare("base", [Heard(None, 3, [(3, -1.0)])], [base], None, 0.05)
