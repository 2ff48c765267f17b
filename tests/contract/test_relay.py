"""The gateway in front of processes of another engine: bytes as they are, nothing lost when one dies, adapters too.

The engine is `tests/upstream.py`, which does what requests say.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.backends import START_SECONDS
from serve.engines import remote
from serve.engines.fleet import Ask
from serve.engines.process import Launch, Patience
from serve.engines.translation import AsIs
from serve.gateway import create_app
from serve.settings import Settings
from suite.envs import Environment
from suite.errors import SuiteError
from tests.contract.threaded import threaded
from tests.tiny.tiny_models import tiny_adapter, tiny_model

UPSTREAM = Path(__file__).parents[1] / "upstream.py"


@dataclass
class Pretended:
    """An engine whose program is `upstream.py`."""

    given: dict[str, Any]
    loads_adapters: bool = True
    name: str = "vllm"
    parser: str = "parser = None"
    most: int | None = None

    def translation(self, settings: Settings) -> AsIs:
        return AsIs()

    def check(self, settings: Settings) -> None:
        pass

    def room(self, settings: Settings) -> int | None:
        return self.most

    def precision(self, settings: Settings) -> str:
        return "float32"

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        journal = self.given.get("journal")
        if journal:
            with Path(journal).open("a") as file:
                file.write(f"launch {replica} {' '.join(settings.adapters)}\n")
        return Launch([sys.executable, "-S", str(UPSTREAM), str(port), json.dumps(self.given)], {"UPSTREAM_KEY": key})


@dataclass
class Running:
    """A gateway, its engine's processes, and what they noted."""

    http: httpx.Client
    journal: Path
    url: str

    def chat(self, text: str, model: str = "base", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        return self.http.post("/v1/chat/completions", json=body)

    def together(self, texts: list[str]) -> list[httpx.Response]:
        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.url, timeout=60) as client:
                bodies = [{"model": "base", "messages": [{"role": "user", "content": text}]} for text in texts]
                return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

        return asyncio.run(ask())

    def lines(self, start: str = "") -> list[str]:
        return [line for line in self.journal.read_text().splitlines() if line.startswith(start)]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.journal.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("relay")
    base = tiny_model(root / "base")
    for seed, name in enumerate("abc"):
        tiny_adapter(base, root / name, seed=seed)
    (root / "more").mkdir()
    for name in "bc":
        (root / name).rename(root / "more" / name)
    return root


@contextlib.contextmanager
def gateway(folder: Path, scratch: Path, kind: Pretended, *, wait: bool = True, **options: Any) -> Iterator[Running]:
    """It has started inside the block, or with `wait` False may be starting."""
    journal = scratch / "journal"
    kind.given = {"journal": str(journal), **kind.given}
    given = {"probe": False, "log": "off", "adapters": {"a": folder / "a"}, **options}
    settings = Settings(model=folder / "base", backend="vllm", env_python=sys.executable, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(remote.KINDS, "vllm", kind)
        settings.check()
        ready = threading.Event()
        failed: list[Any] = []

        def loaded(error: Any) -> None:
            failed.append(error)
            ready.set()

        app = create_app(settings, loaded=loaded)
    with threaded(app) as url:
        if wait:
            assert ready.wait(30)
            if failed[0]:
                raise failed[0]
        with httpx.Client(base_url=url, timeout=60) as http:
            yield Running(http, journal, url)


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


def test_every_replica_is_probed_and_again_in_its_next_life(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    class Probe:
        """Finds "x" wrong on the replica that is asked second."""

        async def prepare(self, _: Any) -> None:
            pass

        async def __call__(self, ask: Ask, adapters: Any) -> None:
            asked.append((ask.url, [*adapters]))
            if ["x"] in [names for _, names in asked[:-1]] and "x" in adapters:
                raise SuiteError("the adapter 'x' has no effect in this engine")

    monkeypatch.setattr(remote, "ParityProbe", lambda *_, **__: Probe())
    options: dict[str, Any] = {"probe": True, "replicas": 2, "lora_dir": [str(folder / "more")]}
    with gateway(folder, tmp_path, Pretended({}), **options) as running:

        def load(name: str, path: str) -> httpx.Response:
            return running.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        def news(count: int) -> list[list[str]]:
            """What replicas were asked about since the last time: each once."""
            running.until(lambda: len(asked) >= count)
            assert len({url for url, _ in asked}) == count
            found = [names for _, names in asked]
            asked.clear()
            return found

        assert news(2) == [["a"], ["a"]]
        running.until(lambda: len({a.json()["id"] for a in running.together(["x"] * 4)}) == 2)
        assert load("d", "b").status_code == 200
        assert news(2) == [["d"], ["d"]]
        refused = load("x", "c")
        assert (refused.status_code, "no effect" in refused.text) == (400, True)
        assert news(2) == [["x"], ["x"]]
        assert running.chat("x", "x").status_code == 404
        assert len(running.lines("/v1/unload_lora_adapter")) == 2
        assert running.chat("die once").status_code == 200
        assert news(1) == [["a", "d"]]


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
