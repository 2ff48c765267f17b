"""Asking an endpoint that fails in every way: each question gets exactly the reply, or the failure, it deserves."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai_fake import Say, serve

from evalsets.ask import Client, Journal, Reply, Request, parse
from suite.errors import SuiteError


def requests(n: int) -> list[Request]:
    return [Request(f"q{i}", "chat/completions", {"model": "m", "messages": [user(i)]}) for i in range(n)]


def user(i: int) -> dict[str, str]:
    return {"role": "user", "content": str(i)}


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"])


def client(url: str, **settings: Any) -> Client:
    return Client(url, **{"concurrency": 4, "pause": 0.001, "timeout": 10.0} | settings)


def test_every_question_gets_its_own_answer(tmp_path: Path) -> None:
    with serve(lambda body: Say(f"is {number(body)}")) as fake:
        replies = client(fake.url).ask(requests(50), Journal(tmp_path / "j"))
    assert {i: r.text for i, r in replies.items()} == {f"q{i}": f"is {i}" for i in range(50)}
    assert len(fake.asked) == 50
    assert 1 < fake.most_at_once <= 4
    assert all(r.tokens == 2 and r.finish == "stop" and r.latency > 0 and not r.error for r in replies.values())


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_url_may_end_in_v1(tmp_path: Path, ending: str) -> None:
    with serve(lambda body: Say("ok")) as fake:
        assert client(fake.url + ending).ask(requests(1), Journal(tmp_path / "j"))["q0"].text == "ok"


def test_what_was_not_answered_is_sent_again(tmp_path: Path) -> None:
    faults = {
        1: Say(status=500), 2: Say(status=429, headers={"retry-after": "0"}), 3: Say(status=503, body=b"busy"), 4: Say("x", cut=True),
    }  # fmt: skip
    seen: list[int] = []

    def rule(body: dict[str, Any]) -> Say:
        i = number(body)
        seen.append(i)
        return faults[i] if i in faults and seen.count(i) < 3 else Say("right")

    with serve(rule) as fake:
        replies = client(fake.url).ask(requests(6), Journal(tmp_path / "j"))
    assert {r.text for r in replies.values()} == {"right"}
    assert {i: r.attempts for i, r in replies.items()} == {"q0": 1, "q1": 3, "q2": 3, "q3": 3, "q4": 3, "q5": 1}


FAULTS = [
    (Say(status=500), "HTTP 500: (empty)", False, 3),
    (Say(status=500, body=b'{"error": {"message": "out of memory"}}'), "HTTP 500: out of memory", False, 3),
    (Say(status=400, body=b'{"error": {"message": "context overflow"}}'), "HTTP 400: context overflow", True, 1),
    (Say(status=400, body=b'{"object": "error", "message": "flat"}'), "HTTP 400: flat", True, 1),
    (Say(status=404, body=b'{"error": "gone"}'), "HTTP 404: gone", True, 1),
    (Say(status=501, body=b'{"error": "no echo"}'), "HTTP 501: no echo", True, 1),
    (Say(body=b"<html>proxy</html>"), "not an OpenAI reply: <html>proxy</html>", False, 1),
    (Say(body=b""), "not an OpenAI reply: (empty)", False, 1),
    (Say(body=b"[]"), "not an OpenAI reply: []", False, 1),
    (Say(body=b'{"choices": []}'), 'not an OpenAI reply: {"choices": []}', False, 1),
    (Say(body=b'{"choices": [{"message": {}}]}'), 'not an OpenAI reply: {"choices": [{"message": {}}]}', False, 1),
    (Say("late", delay=60), "no answer within 2 s", False, 1),
    (Say("x", cut=True), "no connection (ClientPayloadError)", False, 3),
]


def test_a_failure_is_a_reply_with_its_reason(tmp_path: Path) -> None:
    n = len(FAULTS)
    with serve(lambda body: FAULTS[number(body)][0] if number(body) < n else Say("fine")) as fake:
        replies = client(fake.url, attempts=3, timeout=2).ask(requests(n + 20), Journal(tmp_path / "j"))
    failed = [replies[f"q{i}"] for i in range(n)]
    assert [(r.error, r.refused, r.attempts, r.text) for r in failed] == [(*fault[1:], "") for fault in FAULTS]
    assert [replies[f"q{i}"].text for i in range(n, n + 20)] == ["fine"] * 20


def test_an_endpoint_that_is_gone_is_not_asked_for_ever(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    replies = client(f"http://127.0.0.1:{port}", attempts=2).ask(requests(100), Journal(tmp_path / "j"))
    assert len(replies) == 100
    assert all(r.error for r in replies.values())
    assert sum(r.attempts for r in replies.values()) < 40
    assert replies["q99"].error == "not asked: the endpoint does not answer"


def test_an_endpoint_that_hangs_is_not_waited_for_a_hundred_times(tmp_path: Path) -> None:
    with serve(lambda body: Say("late", delay=60)) as fake:
        replies = client(fake.url, timeout=0.2, concurrency=10).ask(requests(100), Journal(tmp_path / "j"))
    assert 10 <= sum(r.attempts for r in replies.values()) <= 20
    assert {r.error for r in replies.values()} == {"no answer within 0.2 s", "not asked: the endpoint does not answer"}


def test_an_endpoint_that_dies_half_way_fails_the_rest_only(tmp_path: Path) -> None:
    died = False

    def rule(body: dict[str, Any]) -> Say:
        nonlocal died
        died = died or number(body) == 30
        return Say("x", cut=True) if died else Say("fine")

    with serve(rule) as fake:
        replies = client(fake.url, attempts=2).ask(requests(60), Journal(tmp_path / "j"))
    answered = {i for i, r in replies.items() if not r.error}
    assert {f"q{i}" for i in range(27)} <= answered <= {f"q{i}" for i in range(30)}
    assert len(replies) == 60
    kept = [r for r in Journal(tmp_path / "j").read() if not r.error]
    assert {r.id for r in kept} == answered


def test_answers_of_a_killed_run_are_used_and_nothing_else_is(tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "j"
    with serve(lambda body: Say(status=400) if number(body) == 2 else Say(f"first {number(body)}")) as fake:
        client(fake.url).ask(requests(5), Journal(journal))
    text = journal.read_text("utf-8").split("\n")
    kept = [line for line in text if '"q2"' in line or '"q0"' in line or '"q1"' in line]
    journal.write_text("\n".join(kept) + '\n{"id": "q3", "digest": "tor', "utf-8")  # killed while it wrote
    calls: list[tuple[str, bool]] = []
    with serve(lambda body: Say(f"second {number(body)}")) as fake:
        client(fake.url).ask(requests(5), Journal(journal), lambda reply, fresh: calls.append((reply.text, fresh)))
        assert sorted(map(number, fake.asked)) == [2, 3, 4]
        assert sorted(calls) == [
            ("first 0", False), ("first 1", False), ("second 2", True), ("second 3", True), ("second 4", True),
        ]  # fmt: skip
        fake.asked.clear()
        replies = client(fake.url).ask(requests(5), Journal(journal))
    assert fake.asked == []
    assert replies["q3"].text == "second 3"


class Slow(Journal):
    """Takes longer over an answer than an endpoint may take to give one."""

    def after(self, request: Request, reply: Reply) -> dict[str, Any]:
        time.sleep(0.3)
        return {"id": reply.id, "seen": True}


def test_a_slow_journal_makes_no_answer_late(tmp_path: Path) -> None:
    with serve(lambda body: Say("fine", delay=0.2)) as fake:
        replies = client(fake.url, timeout=2, concurrency=8).ask(requests(16), Slow(tmp_path / "j"))
    assert {reply.text for reply in replies.values()} == {"fine"}
    assert len(Journal(tmp_path / "j").read()) == 16
    assert (tmp_path / "j").read_text("utf-8").count('"seen": true') == 16


class Waiting(Journal):
    """Does not get over the first answer before all others are in the file."""

    kept = 0

    def after(self, request: Request, reply: Reply) -> None:
        ends = time.monotonic() + 5
        while self.kept < 16 and time.monotonic() < ends:
            time.sleep(0.01)
            self.kept = len(self.read())


def test_an_answer_is_on_the_disk_whatever_is_made_of_those_before(tmp_path: Path) -> None:
    journal = Waiting(tmp_path / "j")
    with serve(lambda body: Say("fine")) as fake:
        client(fake.url, concurrency=1).ask(requests(16), journal)
    assert journal.kept == 16


class Broken(Journal):
    """Cannot make anything of an answer."""

    def after(self, request: Request, reply: Reply) -> dict[str, Any]:
        raise ZeroDivisionError(request.id)


def test_what_goes_wrong_with_an_answer_ends_the_asking(tmp_path: Path) -> None:
    with serve(lambda body: Say("fine", delay=0.05)) as fake:
        with pytest.raises(ZeroDivisionError, match="q0"):
            client(fake.url, concurrency=1).ask(requests(50), Broken(tmp_path / "j"))
        assert len(fake.asked) < 50
    assert Journal(tmp_path / "j").read()[0].text == "fine"  # the answer itself is not lost


def test_another_request_is_another_question(tmp_path: Path) -> None:
    with serve(lambda body: Say(str(body.get("max_tokens")))) as fake:
        first = Request("q", "chat/completions", {"model": "m", "messages": [user(1)], "max_tokens": 1})
        second = Request("q", "chat/completions", {"model": "m", "messages": [user(1)], "max_tokens": 2})
        assert client(fake.url).ask([first], Journal(tmp_path / "j"))["q"].text == "1"
        assert client(fake.url).ask([second], Journal(tmp_path / "j"))["q"].text == "2"


def test_models_are_checked_before_anything_is_asked() -> None:
    with serve(lambda body: Say(), models=["base", "tuned"]) as fake:
        client(fake.url).check_model("tuned")
        with pytest.raises(SuiteError, match="no model 'tunde'") as caught:
            client(fake.url).check_model("tunde")
        assert "tuned" in caught.value.hint
    with pytest.raises(SuiteError, match="no answer from") as caught:
        client(fake.url).check_model("tuned")
    with pytest.raises(SuiteError, match=r"'127.0.0.1:9' is no address"):
        client("127.0.0.1:9").check_model("tuned")
    with serve(lambda body: Say(), models=[]) as fake:
        client(fake.url).check_model("any")  # an endpoint that lists nothing


def test_the_api_key_is_sent_and_never_shown(tmp_path: Path) -> None:
    with serve(lambda body: Say("ok")) as fake:
        asked = client(fake.url, api_key="secret-1")
        asked.ask(requests(1), Journal(tmp_path / "j"))
    assert fake.headers[0]["authorization"] == "Bearer secret-1"
    assert "secret-1" not in repr(asked)
    assert "secret-1" not in (tmp_path / "j").read_text("utf-8")


ECHO = Request("q", "completions", {"model": "m", "prompt": "a b c", "echo": True, "max_tokens": 0, "logprobs": 0})


def echo(text: str, logprobs: list[float | None] | None, prompt_tokens: int = 3) -> bytes:
    choice = {"text": text, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "length"}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": prompt_tokens}}).encode()


def test_log_probabilities_are_those_of_the_prompt() -> None:
    assert parse(ECHO, 200, echo("a b c", [None, -1.0, -2.0])).logprobs == (-1.0, -2.0)
    assert parse(ECHO, 200, echo("a b c d", [None, -1.0, -2.0, -9.0])).logprobs == (-1.0, -2.0)


@pytest.mark.parametrize(
    "content",
    [
        echo(" d", [-9.0]), echo("a b c", None), echo("a b c", [None]), echo("a b c", [None, None, -2.0]),
        echo("a b c", [None, float("nan"), -2.0]), b'{"choices": [{"text": "a b c", "logprobs": null}]}',
    ],
)  # fmt: skip
def test_an_endpoint_that_does_not_score_the_prompt_refuses(content: bytes) -> None:
    reply = parse(ECHO, 200, content)
    assert reply.refused
    assert reply.error.startswith("no log-probabilities of the prompt")
    assert not reply.logprobs


@given(st.binary(max_size=80), st.sampled_from([200, 400]))
def test_no_body_breaks_the_parser(content: bytes, status: int) -> None:
    assert parse(requests(1)[0], status, content).error
    assert parse(ECHO, status, content).error


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "text", "usage", "logprobs", "error"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_values)
def test_no_json_breaks_the_parser(value: Any) -> None:
    for request in (requests(1)[0], ECHO):
        for status in (200, 422):
            assert isinstance(parse(request, status, json.dumps(value).encode()), Reply)


def test_half_a_surrogate_pair_is_no_end(tmp_path: Path) -> None:
    halves = Say(body=b'{"choices": [{"message": {"content": "cut \\ud83d"}}]}')
    journal = tmp_path / "j"
    with serve(lambda body: halves if number(body) else Say(status=400, body=b'{"error": "\\udc00"}')) as fake:
        replies = client(fake.url).ask(requests(2), Journal(journal))
    assert (replies["q1"].text, replies["q0"].error) == ("cut ?", "HTTP 400: ?")
    assert sorted(r.id for r in Journal(journal).read()) == ["q0", "q1"]


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_journal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    journal = tmp_path_factory.mktemp("journal") / "j"
    reply = Reply("q", "d", text=text, logprobs=(-1.0,))
    with Journal(journal).writing() as write:
        write([vars(reply)])
    assert Journal(journal).read() == [reply]
