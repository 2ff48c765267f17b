"""Several models behind one gateway: our own engine in processes of its own, engines of others, endpoints elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from serve.engines import remote
from serve.engines.fleet import Fleet
from serve.engines.process import Patience
from serve.settings import Settings
from suite.errors import SuiteError
from tests.contract.conftest import Served
from tests.contract.pretended import Pretended, gateway
from tests.contract.suite_server import Running, suite_serve
from tests.tiny.tiny_models import tiny_adapter, tiny_model

KEYS = '[ops]\nkey = "sk-ops"\nadmin = true\n[team]\nkey = "sk-team"\nmodels = ["far*", "prod"]\n'
CONFIG = """
[serve]
port = 0
api_key_file = "keys.toml"
alias.prod = {{ law = 1, far = 1 }}
dtype = "float32"
[serve.models.small]
model = "base"
adapters = {{ law = "law" }}
lora_dir = ["more"]
[serve.models.twice]
model = "other"
replicas = 2
[serve.models.far]
url = "{url}/v1"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    base = tiny_model(root / "base")
    tiny_model(root / "other", hidden=64)
    tiny_adapter(base, root / "law", seed=7)
    tiny_adapter(base, root / "more" / "style", seed=8)
    (root / "keys.toml").write_text(KEYS)
    return root


@pytest.fixture(scope="module")
def running(folder: Path, served: Served) -> Iterator[Running]:
    if served.backend != "torch":
        pytest.skip("one endpoint elsewhere is enough")
    (folder / "serve.toml").write_text(CONFIG.format(url=served.endpoint.url))
    with suite_serve(folder, "--config", folder / "serve.toml", "--log", folder / "log.jsonl") as running:
        yield running


def ask(running: Running, model: str, key: str = "ops", **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "The", "max_tokens": 8, "temperature": 0, **more}
    return running.http.post("/v1/completions", json=body, headers={"Authorization": f"Bearer sk-{key}"})


def text(running: Running, model: str) -> str:
    answer = ask(running, model).raise_for_status()
    assert answer.headers["x-model"] == answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def test_each_name_is_answered_by_its_own_model(running: Running, served: Served) -> None:
    headers = {"Authorization": "Bearer sk-ops"}
    cards = {card["id"]: card for card in running.http.get("/v1/models", headers=headers).json()["data"]}
    assert [*cards] == ["small", "law", "style", "twice", "far", "far/base", "far/a", "far/b", "prod"]
    assert (cards["style"]["parent"], cards["far/a"]["parent"]) == ("small", "far")
    assert len({card["fingerprint"] for card in cards.values()}) == 8  # far and far/base are the same
    texts = {name: text(running, name) for name in ("small", "law", "style", "twice", "far/a", "far/b")}
    assert len(set(texts.values())) == 6
    for name in ("base", "a", "b"):
        body = {"model": name, "prompt": "The", "max_tokens": 8, "temperature": 0}
        there = served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert text(running, f"far/{name}") == there
        assert name != "base" or text(running, "far") == there


def test_a_stream_and_a_client_of_openai(running: Running) -> None:
    with OpenAI(base_url=f"{running.http.base_url}/v1", api_key="sk-ops", max_retries=0) as client:
        for model in ("small", "far/a"):
            chunks = [*client.completions.create(model=model, prompt="The", max_tokens=5, stream=True)]
            assert {chunk.model for chunk in chunks} == {model}
            assert chunks[-1].choices[0].finish_reason == "length"


def test_keys_aliases_limits_and_the_log_hold_for_all(running: Running, folder: Path) -> None:
    assert ask(running, "far", key="wrong").status_code == 401
    assert ask(running, "small", key="team").status_code == 404
    assert ask(running, "far/b", key="team").status_code == 200
    models = {ask(running, "prod", key="team", user=f"user {i}").json()["model"] for i in range(12)}
    assert models == {"law", "far"}
    said = ask(running, "far/c").json()["error"]["message"]
    assert "'far/c' does not exist" in said
    page = running.http.get("/metrics", headers={"Authorization": "Bearer sk-ops"}).text
    assert 'suite_engine_running{model="twice"} 0.0' in page
    assert 'suite_alias_requests_total{alias="prod",model="far"}' in page
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {line["model"] for line in lines if line["alias"] == "prod"} == {"law", "far"}
    assert running.http.get("/ready?model=twice").status_code == 200
    assert running.http.get("/ready?model=law").status_code == 404
    assert "models" not in running.http.get("/health").json()  # names are for those with a key


def test_adapters_come_and_go_in_the_model_that_takes_them(running: Running) -> None:
    def change(what: str, **body: str) -> httpx.Response:
        headers = {"Authorization": "Bearer sk-ops"}
        return running.http.post(f"/v1/{what}_lora_adapter", json=body, headers=headers)

    style = text(running, "style")
    assert change("load", lora_name="more", lora_path="style").status_code == 200
    assert text(running, "more") == style
    wrong = change("load", lora_name="x", lora_path="style", model="twice")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")
    assert change("load", lora_name="far/c", lora_path="style", model="far").status_code == 400
    assert change("unload", lora_name="more").status_code == 200
    assert ask(running, "more").status_code == 404


def test_the_end_of_the_gateway_is_the_end_of_its_engines(folder: Path) -> None:
    with suite_serve(folder, "--model", f"one={folder / 'base'}", "--model", f"two={folder / 'other'}") as running:
        assert text(running, "one") != text(running, "two")
        engines = children(running.process.pid)
        assert len(engines) == 4  # two guards, and what they guard
        running.process.kill()
        running.process.wait()
        until(lambda: not any(map(alive, engines)))


def test_a_replica_of_our_own_engine_is_killed_under_load(folder: Path) -> None:
    with suite_serve(folder, "--model", folder / "base", "--replicas", "2") as running:
        engines = children(running.process.pid)

        async def ask() -> list[int]:
            body = {"model": "base", "prompt": "The", "max_tokens": 60, "ignore_eos": True}
            async with httpx.AsyncClient(base_url=running.http.base_url, timeout=60) as client:
                asked = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(24)]
                await asyncio.sleep(0.1)
                victim = next(pid for pid in engines if "-m\0serve\0" in command_line(pid))
                os.kill(victim, signal.SIGKILL)
                return [answer.status_code for answer in await asyncio.gather(*asked)]

        assert asyncio.run(ask()) == [200] * 24
        engines = children(running.process.pid)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0
        until(lambda: not any(map(alive, engines)))


def children(pid: int) -> list[int]:
    """Of a process, and theirs."""
    found = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# engines that fail


def beside(folder: Path, name: str = "big", **options: Any) -> Settings:
    given = {"model": folder / "base", "backend": "vllm", "env_python": sys.executable, "probe": False, **options}
    return Settings(**given, name=name)


class OneFails(Pretended):
    """Where the model is called "big"."""

    def launch(self, settings: Settings, *more: Any) -> Any:
        kept = self.given
        self.given = {**kept, "refuse": "no memory is left"} if settings.name == "big" else kept
        try:
            return super().launch(settings, *more)
        finally:
            self.given = kept


def test_the_one_that_cannot_start_is_named_and_the_others_are_ended(folder: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    kind = OneFails({"child": str(child)})
    with (
        pytest.raises(SuiteError, match=r"(?s)the model 'big' cannot be served.*no memory is left"),
        gateway(folder, tmp_path, kind, adapters={}, name="small", beside=(beside(folder),)),
    ):
        pass
    until(lambda: not alive(int(child.read_text())))


def test_one_that_dies_for_good_leaves_the_others(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = Patience(stop=2, poll=0.02, pause=0.02, longest_pause=0.05, starts=3)
    monkeypatch.setattr(remote, "Fleet", partial(Fleet, patience=hasty))
    kind = Pretended({})
    with gateway(folder, tmp_path, kind, adapters={}, name="small", beside=(beside(folder),)) as running:
        kind.given["refuse"] = "the disk is gone"
        assert running.chat("die", "big").status_code in (502, 503)
        running.until(lambda: running.http.get("/ready?model=big").status_code == 503)
        assert running.chat("x", "small").status_code == 200
        answer = running.chat("x", "big")
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert answer.json()["error"]["message"] == "the engine died 3 times in a row"  # its log is not for clients
        health = running.http.get("/health").json()
        assert health["status"] == "ready"
        assert {name: one["status"] for name, one in health["models"].items()} == {"small": "ready", "big": "failed"}


def test_an_endpoint_elsewhere_may_restart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with gateway(folder, tmp_path / "there", Pretended({"pause": 0.1}), adapters={}) as there:
        far = Settings(name="far", url=there.url)
        with gateway(folder, tmp_path, Pretended({}), adapters={}, name="small", beside=(far,)) as running:
            assert running.chat("x", "far").json()["model"] == "far"
            assert running.chat("die once", "far").status_code == 200  # which its own gateway sees to
            assert running.chat("fail", "far").json()["error"]["message"] == "out of luck"


def test_what_does_not_answer_is_no_model(folder: Path, tmp_path: Path) -> None:
    for url, said in [("http://127.0.0.1:9", "does not answer"), ("ftp://x", "is no address")]:
        far = Settings(name="far", url=url)
        with (
            pytest.raises(SuiteError, match=said),
            gateway(folder, tmp_path, Pretended({}), adapters={}, name="small", beside=(far,)),
        ):
            pass
