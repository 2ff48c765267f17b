"""The gateway in front of processes of another engine: bytes as they are, nothing lost when one dies, adapters too.

The engine is `tests/upstream.py`, which does what requests say.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.backends import START_SECONDS
from serve.engines.process import Patience
from tests.contract.pretended import Pretended, Running, gateway, model_and_adapters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_adapters(tmp_path_factory.mktemp("relay"))


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with gateway(folder, tmp_path_factory.mktemp("running"), Pretended({})) as found:
        yield found


def test_an_engine_that_starts_slowly(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({"delay": 1.5}), wait=False) as running:
        for answer in (running.http.get("/ready"), running.chat("x")):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "loading" in answer.json()["error"]["message"]
        assert running.http.get("/health").json() == {"status": "loading"}
        running.until(lambda: running.http.get("/ready").status_code == 200)
        assert running.chat("x").status_code == 200
    assert Patience.start < START_SECONDS  # or its last words would not be waited for


def test_what_the_engine_may_understand_reaches_it(running: Running) -> None:
    raw = b'{"model":"base", "messages":[{"role":"user","content":"\\u6c34"}], "never_heard_of": [1, {"x": null}],  "n":1}'
    answer = running.http.post("/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert answer.json()["choices"][0]["message"]["content"].encode() == raw


def test_a_stream_comes_as_it_is(running: Running) -> None:
    answer = running.chat("x", stream=True)
    assert answer.headers["content-type"] == "text/event-stream"
    events = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
    assert [event["choices"][0]["delta"]["content"] for event in events] == [f"{i} 水" for i in range(5)]
    assert answer.text.endswith("data: [DONE]\n\n")


def test_an_engine_that_dies_in_a_stream_is_an_error_in_it(running: Running) -> None:
    answer = running.chat("break", stream=True)
    assert '"type": "server_error"' in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")


def test_errors_get_openais_form(running: Running) -> None:
    answer = running.chat("fail")
    assert answer.status_code == 500
    assert answer.json() == {"error": {"message": "out of luck", "type": "X", "param": None, "code": None}}


def test_nothing_is_lost_when_the_engine_dies_under_load(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({"pause": 0.2})) as running:
        answers = running.together([*(f"{i}" for i in range(20)), "die once", *(f"{i}" for i in range(20, 32))])
        assert [answer.status_code for answer in answers] == [200] * 33
        assert len(running.lines("started")) == 2


def test_nothing_is_lost_when_an_engine_takes_its_time_to_die(folder: Path, tmp_path: Path) -> None:
    """Longer than it would be waited for without looking; vLLM's server looks every 5 s whether its engine lives."""
    with gateway(folder, tmp_path, Pretended({"pause": 0.5, "wind_down": 4})) as running:
        answers = running.together([*(f"{i}" for i in range(16)), "lose once"], streams=8)
        assert [answer.status_code for answer in answers] == [200] * 17
        assert all(a.text.count('"delta"') == 5 and a.text.endswith("data: [DONE]\n\n") for a in answers[:8])
        assert len(running.lines("started")) == 2
        assert running.http.get("/health").json()["failed_steps"] == 1


def test_a_connection_that_breaks_while_the_engine_lives_is_another_try(folder: Path, tmp_path: Path) -> None:
    """As where both sides end an idle connection just when a request comes."""
    with gateway(folder, tmp_path, Pretended({})) as running:
        assert running.chat("drop once").status_code == 200
        given_up = running.chat("drop")
        assert (given_up.status_code, len(running.lines("asked drop"))) == (502, 5)
        assert len(running.lines("started")) == 1


def test_requests_are_shared_and_a_replicas_death_is_not_seen(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({"pause": 0.3}), replicas=2) as running:
        running.until(lambda: len(running.lines("started")) == 2)
        running.until(lambda: len({a.json()["id"] for a in running.together(["x"] * 4)}) == 2)
        ids = [answer.json()["id"] for answer in running.together([str(i) for i in range(16)])]
        assert sorted(ids.count(port) for port in set(ids)) == [8, 8]
        answers = running.together([*(str(i) for i in range(8)), "die once", *(str(i) for i in range(8, 16))])
        assert [answer.status_code for answer in answers] == [200] * 17


def test_what_kills_every_engine_is_given_up(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({})) as running:
        answer = running.chat("die")
        assert answer.status_code == 502
        assert answer.json()["error"]["type"] == "server_error"
        assert len(running.lines("asked die")) == 3


def test_a_client_that_goes_away_takes_its_request_with_it(running: Running) -> None:
    with pytest.raises(httpx.ReadTimeout):
        running.http.post(
            "/v1/chat/completions",
            timeout=0.3,
            json={"model": "base", "messages": [{"role": "user", "content": "hang"}]},
        )
    running.until(lambda: bool(running.lines("left")))
    running.until(lambda: running.http.get("/health").json()["running"] == 0)


def test_a_request_may_take_no_longer_than_the_server_allows(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({}), timeout=0.4) as running:
        assert running.chat("hang").status_code == 504
        running.until(lambda: bool(running.lines("left")))


def test_answers_are_no_longer_than_the_server_allows(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({}), max_tokens=8) as running:
        for given, reached in [({}, 8), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 99}, 8)]:
            seen = json.loads(running.chat("x", **given).json()["choices"][0]["message"]["content"])
            assert seen.get("max_tokens", seen.get("max_completion_tokens")) == reached
        # an answer is counted when it has been sent, which may be after its last byte was read
        counted = 'suite_generation_tokens_total{model="base"} 21.0'
        running.until(lambda: counted in running.http.get("/metrics").text)


def test_adapters_come_and_go_while_the_engine_runs(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({}), lora_dir=[str(folder / "more")]) as running:

        def change(what: str, **body: Any) -> str:
            return running.http.post(f"/v1/{what}_lora_adapter", json=body).raise_for_status().text

        change("load", lora_name="dé", lora_path="c")
        assert running.chat("x", "dé").json()["model"] == "dé"
        change("load", lora_name="dé", lora_path="b", load_inplace=True)
        inside = json.loads(running.lines("/v1/load_lora_adapter")[-1].partition(" ")[2])["lora_name"]
        assert inside != "dé"  # what the engine cached for the old one is not taken for the new one's
        answer = running.chat("x", "dé").json()
        assert (answer["model"], json.loads(answer["choices"][0]["message"]["content"])["model"]) == ("dé", inside)
        streamed = running.chat("x", "dé", stream=True).text
        assert streamed.count('"model":"dé"') == 5
        assert inside not in streamed
        assert running.chat("die once").status_code == 200
        assert running.lines("launch")[-1] == f"launch 0 a {inside}"
        change("unload", lora_name="dé")
        assert running.chat("x", "dé").status_code == 404
        assert json.loads(running.lines("/v1/unload_lora_adapter")[-1].partition(" ")[2])["lora_name"] == inside


def test_what_is_tried_again_asks_for_its_adapter_as_it_is_called_by_then(folder: Path, tmp_path: Path) -> None:
    with gateway(folder, tmp_path, Pretended({}), lora_dir=[str(folder / "more")]) as running:

        def load(path: str) -> None:
            body = {"lora_name": "d", "lora_path": path, "load_inplace": True}
            running.http.post("/v1/load_lora_adapter", json=body).raise_for_status()

        load("b")
        answers: list[dict[str, Any]] = []
        asking = threading.Thread(target=lambda: answers.append(running.chat("hang once", "d").json()))
        asking.start()
        running.until(lambda: bool(running.lines("asked hang")))
        load("c")
        assert running.chat("die once").status_code == 200
        asking.join()
        (answer,) = answers
        inside = json.loads(answer["choices"][0]["message"]["content"])["model"]
        assert running.lines("launch")[-1] == f"launch 0 a {inside}"
        assert (answer["model"], inside != "d") == ("d", True)


@pytest.mark.parametrize(
    "kind", [Pretended({"pause": 0.2}, False), Pretended({"pause": 0.2}, most=1)], ids=["never", "full"]
)
def test_an_engine_that_takes_no_more_adapters_is_started_again_and_requests_wait(
    folder: Path, tmp_path: Path, kind: Pretended
) -> None:
    with gateway(folder, tmp_path, kind, lora_dir=[str(folder / "more")]) as running:
        statuses: list[int] = []
        asking = threading.Thread(target=lambda: statuses.extend(a.status_code for a in running.together(["x"] * 8)))
        asking.start()
        running.http.post("/v1/load_lora_adapter", json={"lora_name": "d", "lora_path": "c"}).raise_for_status()
        assert running.chat("x", "d").status_code == 200
        asking.join()
        assert statuses == [200] * 8
        first, second = running.lines("launch")
        assert second == f"{first} d"
        # one that never takes any has all that are offered from the start
        assert first == ("launch 0 a" if kind.loads_adapters else "launch 0 a b c")


def test_only_what_asks_a_model_is_relayed(running: Running) -> None:
    assert running.http.post("/v1/pause", json={"model": "base"}).status_code == 404
    assert running.http.get("/v1/chat/completions").status_code == 405
    assert (
        running.http.post("/v1/chat/completions", content=b"x", headers={"Content-Type": "text/plain"}).status_code
        == 415
    )
    assert running.chat("x", "nobody").json()["error"]["code"] == "model_not_found"
