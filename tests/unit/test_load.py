"""A load on an endpoint: its figures are what their definitions say of times that are known to the digit."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalsets.load.client import read
from evalsets.load.requests import Shape, arrivals
from evalsets.load.saturation import SHARE, search
from evalsets.load.timing import Timing, by_model, figures


def event(came: float, **body: Any) -> tuple[float, bytes]:
    return came, b"data: " + json.dumps(body).encode() + b"\n"


def said(came: float, text: str | None = None, finish: str | None = None) -> tuple[float, bytes]:
    delta = {} if text is None else {"content": text}
    return event(came, choices=[{"delta": delta, "finish_reason": finish}])


ANSWER = [
    said(10.1, ""), (10.1, b"\n"), said(10.2, "a"), said(10.5, "b c"), said(11.2, "d"), said(11.3, finish="stop"),
    event(11.4, choices=[], usage={"prompt_tokens": 7, "completion_tokens": 6}), (11.5, b"data: [DONE]\n"),
]  # fmt: skip


def test_an_answer_is_timed_by_its_text() -> None:
    timing = read("m", 9.5, 10.0, ANSWER)
    assert timing == Timing("m", 9.5, 10.0, (10.2, 10.5, 11.2), 7, 6)
    assert timing.ttft == pytest.approx(0.2)
    assert timing.e2e == pytest.approx(1.2)
    assert timing.tpot == pytest.approx(1.0 / 5)  # of six tokens, however many chunks
    assert timing.itl == pytest.approx((0.3, 0.7))
    without_usage = [e for e in ANSWER if b"usage" not in e[1]]
    assert read("m", 0, 10.0, without_usage).new_tokens == 3
    assert Timing("m", 0, 0.0, (1.0,), 5, 1).tpot is None


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([], "the answer breaks off"), (ANSWER[:4], "the answer breaks off"), ([said(1, finish="stop")], "an empty answer"),
        ([*ANSWER[:3], event(11, error={"message": "out of memory"})], "HTTP 200: out of memory"),
        ([(1.0, b"data: {torn\n")], "not a stream of chat completions"),
        ([event(1.0, choices=[7])], "not a stream of chat completions"),
        ([*ANSWER[:6], event(11.4, choices=[], usage=["?"])], "not a stream of chat completions"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_a_failure(events: Any, error: str) -> None:
    timing = read("m", 0.0, 0.0, events)
    assert (timing.error, timing.chunks) == (error, ())


@given(st.lists(st.tuples(st.floats(0, 9), st.binary(max_size=40).map(lambda b: b"data: " + b)), max_size=5))
def test_no_stream_breaks_the_reader(events: list[tuple[float, bytes]]) -> None:
    assert read("m", 0.0, 0.0, events).error


def test_figures_are_those_of_the_definitions() -> None:
    timings = [
        Timing("a" if i % 2 else "b", i, i, tuple(i + 0.1 * (i + 1) + 0.05 * k for k in range(5)), 100, 5)
        for i in range(10)
    ]
    timings.append(Timing("a", 3.0, 3.02, error="HTTP 429: busy"))
    found = figures(timings, {"ttft": 450.0, "tpot": 60.0})
    assert (found["requests"], found["failed"], found["errors"]) == (11, 1, {"HTTP 429: busy": 1})
    seconds = 9 + 1.0 + 0.2
    assert found["seconds"] == pytest.approx(seconds)
    assert found["new_tokens_per_s"] == pytest.approx(50 / seconds)
    assert found["prompt_tokens_per_s"] == pytest.approx(1000 / seconds)
    first = [100.0 * (i + 1) for i in range(10)]
    assert found["ttft"]["mean"] == pytest.approx(550)
    for p in (50, 90, 95, 99):
        assert found["ttft"][f"p{p}"] == pytest.approx(np.percentile(first, p))
        assert (found["tpot"][f"p{p}"], found["itl"][f"p{p}"]) == (pytest.approx(50), pytest.approx(50))
    assert found["e2e"]["max"] == pytest.approx(1200)
    assert found["late"] == pytest.approx(20)
    assert found["goodput"] == {
        "limits": {"ttft": 450.0, "tpot": 60.0}, "share": 4 / 11, "requests_per_s": pytest.approx(4 / seconds),
    }  # fmt: skip
    assert {name: part["requests"] for name, part in by_model(timings).items()} == {"a": 6, "b": 5}


def test_a_load_of_failures_has_figures() -> None:
    found = figures([Timing("m", 0.0, 0.0, error="no connection")] * 3, {"ttft": 1.0})
    assert (found["failed"], found["requests_per_s"], found["goodput"]["share"], "ttft" in found) == (
        3,
        0.0,
        0.0,
        False,
    )
    assert figures([])["requests"] == 0


@given(st.integers(1, 300), st.floats(0.1, 1000), st.integers(0, 5))
def test_arrivals_are_as_many_as_asked_for_in_their_time(count: int, rate: float, seed: int) -> None:
    times = arrivals(count, rate, seed)
    assert (len(times), times) == (count, sorted(times))
    assert times[0] >= 0
    assert times[-1] <= count / rate
    assert times == arrivals(count, rate, seed)


def test_gaps_between_arrivals_are_those_of_a_poisson_process() -> None:
    gaps = np.diff(arrivals(20_000, 5.0, 0))
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.01)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.03)  # exponential: as large as the mean
    assert np.mean(gaps > 0.2) == pytest.approx(np.exp(-1), abs=0.01)


def test_prompts_are_new_each_time_and_the_same_for_a_seed() -> None:
    shape = Shape(["a", "b"], 30, 8, {"ignore_eos": True}, seed=3)
    bodies = shape.bodies(100)
    assert [body["model"] for body in bodies[:3]] == ["a", "b", "a"]
    contents = [body["messages"][0]["content"] for body in bodies]
    assert len({text.split()[0] for text in contents}) > 98
    assert {len(text.split()) for text in contents} == {30}
    assert bodies[40:50] == shape.bodies(10, 40)
    assert bodies != Shape(["a", "b"], 30, 8, {"ignore_eos": True}, seed=4).bodies(100)
    assert (bodies[0]["max_tokens"], bodies[0]["ignore_eos"]) == (8, True)


@given(st.floats(0.05, 500), st.floats(0.05, 500), st.integers(1, 14))
def test_the_search_is_bounded_and_right(capacity: float, start: float, probes: int) -> None:
    def probe(rate: float, requests: int) -> dict[str, Any]:
        share = 1.0 if rate <= capacity else SHARE / 2
        return {"goodput": {"share": share}, "requests": requests, "seconds": requests / rate}

    rate, made = search(probe, start, probes, 10)
    assert len(made) <= probes
    assert rate is None or rate <= capacity
    assert all(m["kept"] == (m["rate"] <= capacity) for m in made)
    if len(made) < probes:
        assert rate is not None
        assert capacity / rate < 1.11


def queue(service: float, latency: float, limit: float, asked: list[int]) -> Any:
    """A probe of an endpoint with a queue, each of whose requests keeps the next waiting for `service` seconds.

    An answer takes `latency` more, whatever else is asked; all in seconds. Notes in `asked` how many requests came.
    """

    def probe(rate: float, requests: int) -> dict[str, Any]:
        asked.append(requests)
        free, timings = 0.0, []
        for came in arrivals(requests, rate, 0):
            free = max(free, came) + service
            timings.append(Timing("m", came, came, (free + latency,), 1, 1))
        return figures(timings, {"e2e": 1000 * limit})

    return probe


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0, 5.0, 60.0])
@pytest.mark.parametrize("start", [1.0, 60.0, 3000.0])
def test_a_queue_that_is_emptied_after_the_last_request_bears_no_more_than_its_rate(limit: float, start: float) -> None:
    """Within some seconds a server of 100 requests a second answers 200, at whatever rate these come."""
    asked: list[int] = []
    rate, made = search(queue(0.01, 0.0, limit, asked), start, 20, 200)
    assert rate is not None
    assert 90 < rate < 100 * 1.12
    assert not all(probe["kept"] for probe in made)
    assert sum(asked) < 20_000


def test_an_endpoint_that_grows_faster_for_ever_is_not_asked_for_ever() -> None:
    """As one that starts more machines while it is asked."""
    asked: list[int] = []

    def probe(_: float, requests: int) -> dict[str, Any]:
        asked.append(requests)
        return {"goodput": {"share": 1.0}, "requests": requests, "seconds": requests / 1.2 ** len(asked)}

    search(probe, 1000.0, 1, 10)
    assert asked == [10, 40, 160, 640, 2560]


@pytest.mark.parametrize("latency", [0.3, 3.0])
def test_slow_answers_are_no_queue(latency: float) -> None:
    """An endpoint that computes everything at the same time bears more than all rates that are tried."""
    asked: list[int] = []
    rate, made = search(queue(0.0, latency, 5.0, asked), 10.0, 5, 50)
    assert rate == 160
    assert all(probe["kept"] for probe in made)
    assert asked[:2] == ([50, 50] if latency < 1 else [50, 200])  # where answers come as fast, nobody asks more
