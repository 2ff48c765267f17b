"""LMDeploy's server behind our gateway: adapters that it takes only at its start, death under load, why it fails.

Without a GPU another engine computes below it (`tests/lmdeploy_stub.py`). What its endpoint answers is in
tests/contract, which runs over it too where its environment is installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.backends import endpoint
from serve.engines.lmdeploy import FORMATS, PARSERS, Lmdeploy
from serve.probe import references
from serve.settings import Settings
from suite.envs import Environment
from suite.errors import SuiteError
from tests import lmdeploy_engine
from tests.contract.suite_server import suite_serve
from tests.tiny.tiny_models import tiny_adapter

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
pytestmark = [pytest.mark.timeout(600), *([pytest.mark.gpu] if lmdeploy_engine.REAL else [])]
QUESTION = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small and different; one has the name of a chat template that LMDeploy knows."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_adapter(NANO, root / name, rank=4, seed=i) for i, name in enumerate(("a", "llama2", "c", "d"))}


@pytest.fixture(scope="module")
def python(installed: Callable[[str], Environment], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lmdeploy_engine.interpreter(installed("lmdeploy"), tmp_path_factory.mktemp("lmdeploy") / "bin")


@dataclass
class Nano:
    """Nano with the adapters a and llama2; c is offered."""

    http: httpx.Client
    url: str

    def together(self, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
                return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))

        return asyncio.run(ask())


@pytest.fixture(scope="module")
def nano(python: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nano]:
    offered = tmp_path_factory.mktemp("offered")
    shutil.copytree(adapters["c"], offered / "c")
    started = {name: adapters[name] for name in ("a", "llama2")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_HOME", str(tmp_path_factory.mktemp("home")))
        options: dict[str, Any] = {"env_python": str(python), "max_length": 1024, "lora_dir": [str(offered)]}
        with (
            endpoint(NANO, started, backend="lmdeploy", **options) as running,
            httpx.Client(base_url=running.url, timeout=120) as http,
        ):
            yield Nano(http, running.url)


def words(folder: Path) -> list[str]:
    try:
        return (folder / "cmdline").read_text().split("\0")
    except OSError:  # it has ended
        return []


def servers() -> dict[int, list[str]]:
    """Processes of LMDeploy's server, with their command lines, but for the guards around them."""
    found = {int(folder.name): words(folder) for folder in Path("/proc").glob("[0-9]*")}
    return {pid: said for pid, said in found.items() if "api_server" in said and "serve.engines.guard" not in said}


def test_greedy_tokens_are_our_engines_for_base_and_adapters_asked_at_once(
    nano: Nano, adapters: dict[str, Path]
) -> None:
    known = references(NANO, {name: adapters[name] for name in ("a", "llama2", "c")})
    asked = [(name or "base", entry) for name, entries in known.items() for entry in entries]
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": entry.question}],
            "max_tokens": 12,
            "temperature": 0,
            "return_token_ids": True,
        }
        for model, entry in asked
    ]
    answers = [answer.raise_for_status().json() for answer in nano.together(bodies)]
    # where it stops, ours went on for the reference
    for answer, (_, entry) in zip(answers, asked, strict=True):
        ids = answer["choices"][0]["token_ids"]
        assert ids == [token.id for token in entry.answer][: len(ids)]
        assert answer["usage"]["prompt_tokens"] == len(entry.prompt)
    assert [answer["model"] for answer in answers] == [model for model, _ in asked]
    assert len({json.dumps([[t.id for t in e.answer] for e in entries]) for entries in known.values()}) == 4


def test_an_adapter_is_added_and_taken_away_while_requests_wait(nano: Nano, adapters: dict[str, Path]) -> None:
    body = {"messages": QUESTION, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    before = set(servers())
    statuses: list[int] = []

    def ask() -> None:
        for _ in range(3):
            bodies = [{**body, "model": model} for model in ("base", "a", "llama2", "c")]
            statuses.extend(answer.status_code for answer in nano.together(bodies))

    asking = threading.Thread(target=ask)
    asking.start()
    given = {"lora_name": "d", "lora_path": "c"}
    assert nano.http.post("/v1/load_lora_adapter", json=given, timeout=120).raise_for_status()
    added = nano.http.post("/v1/chat/completions", json={**body, "model": "d"}).raise_for_status().json()
    asking.join()
    assert statuses == [200] * 12
    assert added["model"] == "d"
    same = nano.http.post("/v1/chat/completions", json={**body, "model": "c"}).json()
    assert added["choices"][0]["message"] == same["choices"][0]["message"]
    (process,) = servers().items()
    assert process[0] not in before
    assert any(word.startswith("d@") for word in process[1])
    nano.http.post("/v1/unload_lora_adapter", json={"lora_name": "d"}, timeout=120).raise_for_status()
    assert nano.http.post("/v1/chat/completions", json={**body, "model": "d"}).status_code == 404


def test_calls_of_tools_are_read_by_its_parser(nano: Nano) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    body = {
        "model": "base", "messages": QUESTION, "temperature": 0, "max_tokens": 60, "tools": [tool],
        "tool_choice": "required",
    }  # fmt: skip
    whole = nano.http.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in whole["message"]["tool_calls"]][:1] == ["get_weather"]


def test_its_key_is_needed_and_on_no_command_line(nano: Nano) -> None:
    ((pid, said),) = servers().items()
    assert "--api-keys" not in said
    port = said[said.index("--server-port") + 1]
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    # nor do processes that it starts find it
    assert b"SUITE_ENGINE_KEY" in Path(f"/proc/{pid}/environ").read_bytes()


def test_no_request_is_lost_when_the_engine_is_killed_under_load(nano: Nano) -> None:
    body = {"messages": QUESTION, "max_tokens": 120, "ignore_eos": True}
    answers: list[httpx.Response] = []
    bodies = [{**body, "model": ("base", "a", "llama2", "c")[i % 4]} for i in range(16)]
    asking = threading.Thread(target=lambda: answers.extend(nano.together(bodies)))
    asking.start()
    time.sleep(0.5)
    (engine,) = servers()
    os.kill(engine, signal.SIGKILL)
    asking.join()
    assert [answer.status_code for answer in answers] == [200] * 16
    assert nano.http.get("/health").json()["failed_steps"] == 1


@pytest.fixture
def refused(python: Path) -> Callable[..., str]:
    """Why a server did not start."""

    def start(model: Path = NANO, adapters: dict[str, Path] | None = None, **options: Any) -> str:
        given = {"env_python": str(python), "max_length": 512, **options}
        with pytest.raises(SuiteError) as failed, endpoint(model, adapters, backend="lmdeploy", **given):
            pass
        return str(failed.value)

    return start


def test_another_chat_template_is_refused(refused: Callable[..., str]) -> None:
    said = refused(extra={"chat-template": "llama2"})
    assert "tokens for 'Who are you?', and was made for" in said
    assert "another chat template is in force" in said


def test_its_own_parser_refuses_unknown_options(refused: Callable[..., str]) -> None:
    assert "did you mean '--max-prefill-token-num'?" in refused(extra={"max-prefill-token-nun": 4})
    assert "invalid choice: 'cpu'" in refused(extra={"device": "cpu"})


def test_what_it_refuses_is_its_last_words(refused: Callable[..., str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(NANO, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["No"], "model_type": "nothing"}))
    said = refused(broken, probe=False)
    assert "could not start" in said
    assert "nothing" in said


def test_nothing_is_left_when_the_gateway_is_killed(python: Path, tmp_path: Path) -> None:
    others = set(servers())
    arguments = [
        "--model",
        NANO,
        "--backend",
        "lmdeploy",
        "--env-python",
        python,
        "--max-length",
        "512",
        "--probe=false",
    ]
    with suite_serve(tmp_path, *arguments, SUITE_HOME=str(tmp_path / "home")) as running:
        assert len(set(servers()) - others) == 1
        running.process.kill()
        deadline = time.monotonic() + 30
        while set(servers()) - others:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_what_it_has_no_option_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(**options: Any) -> None:
        Lmdeploy().check(Settings(model=tmp_path, env_python="python", **options))

    check()
    for options in (
        {"dtype": "float32"},
        {"cache_memory": 2**30},
        {"extra": {"backend": "turbomind"}, "lora_dir": [str(tmp_path)]},
    ):
        with pytest.raises(SuiteError):
            check(**options)
    monkeypatch.setattr("suite.envs.device", lambda: "cpu")
    with pytest.raises(SuiteError, match="needs a GPU"):
        Lmdeploy().check(Settings(model=tmp_path))


def test_names_that_are_its_own(installed: Callable[[str], Environment]) -> None:
    """Of parsers and formats, asked of the one that is installed."""
    import subprocess

    code = (
        "import json; from lmdeploy.serve.parsers.tool_parser import ToolParserManager as m\n"
        "from lmdeploy.cli.serve import SubCliServe as s\n"
        "s.add_parser_api_server(); p = s.subparsers.choices['api_server']\n"
        "formats = next(a.choices for a in p._actions if a.dest == 'model_format')\n"
        "print(json.dumps([sorted(m.module_dict), formats]))"
    )
    command = [str(installed("lmdeploy").python), "-I", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parsers, formats = json.loads(said.splitlines()[-1])
    assert set(PARSERS.values()) <= set(parsers)
    assert set(FORMATS) <= set(formats)
