"""The real vLLM behind our gateway: the probe's judgement, adapters that come and go, death under load, why it fails.

What its endpoint answers is in tests/contract, which runs over it too where its environment is installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from serve.backends import endpoint
from serve.engines.vllm import PARSERS, RANKS
from serve.probe import references
from suite import envs
from suite.chat import load_tokenizer
from suite.envs import Environment
from suite.errors import SuiteError
from tests.contract.suite_server import suite_serve
from tests.tiny.tiny_models import tiny_adapter

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
pytestmark = [pytest.mark.timeout(600), *([pytest.mark.gpu] if envs.device() == "cuda" else [])]
ALL = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small, and different."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: tiny_adapter(NANO, root / name, rank=4 * i, seed=i) for i, name in enumerate("abcd", 1)}


@dataclass
class Nano:
    """Nano with adapters a, b and c; d may be added."""

    http: httpx.Client
    url: str
    python: Path

    def answer(self, model: str, prompt: list[int]) -> list[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **ALL}
        found = self.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["token_ids"]
        return list(found)


@pytest.fixture(scope="module")
def nano(
    installed: Callable[[str], Environment], adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nano]:
    python = installed("vllm").python
    offered = tmp_path_factory.mktemp("offered")
    shutil.copytree(adapters["d"], offered / "d")
    started = {name: adapters[name] for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_HOME", str(tmp_path_factory.mktemp("home")))
        options: dict[str, Any] = {"env_python": str(python), "max_length": 1024, "lora_dir": [str(offered)]}
        with (
            endpoint(NANO, started, backend="vllm", **options) as running,
            httpx.Client(base_url=running.url, timeout=120) as http,
        ):
            yield Nano(http, running.url, python)


def test_greedy_tokens_are_our_engines_for_base_and_adapters_asked_at_once(
    nano: Nano, adapters: dict[str, Path]
) -> None:
    known = references(NANO, adapters)
    asked = [(name or "base", entry) for name in ("", *"abcd") for entry in known[name]]

    async def ask() -> list[list[int]]:
        async with httpx.AsyncClient(base_url=nano.url, timeout=120) as client:
            bodies = [{"model": m, "prompt": e.prompt, "max_tokens": 12, "temperature": 0, **ALL} for m, e in asked]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.raise_for_status().json()["choices"][0]["token_ids"] for answer in answers]

    wanted = [[token.id for token in entry.answer] for _, entry in asked]
    assert asyncio.run(ask()) == wanted
    assert len({json.dumps([[t.id for t in e.answer] for e in known[name]]) for name in known}) == 5


def test_an_adapter_is_replaced_and_taken_away(nano: Nano, adapters: dict[str, Path]) -> None:
    prompt = references(NANO, {})[""][3].prompt

    def change(what: str, **body: Any) -> httpx.Response:
        return nano.http.post(f"/v1/{what}_lora_adapter", json=body)

    change("load", lora_name="e", lora_path="d").raise_for_status()
    assert nano.answer("e", prompt) == nano.answer("d", prompt)
    assert change("load", lora_name="e", lora_path=str(adapters["a"])).status_code == 400  # lies elsewhere
    change("unload", lora_name="e").raise_for_status()
    gone = nano.http.post("/v1/completions", json={"model": "e", "prompt": prompt})
    assert gone.status_code == 404


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_of_tools_are_read_whole_and_streamed(nano: Nano, choice: Any) -> None:
    """With "auto" the model writes them as it has learnt to, and vLLM's parser finds them."""
    question: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    asked: dict[str, Any] = {
        "model": "base", "messages": question, "temperature": 0, "max_tokens": 80, "tools": [WEATHER],
        "tool_choice": choice,
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole.message.tool_calls
    (call,) = whole.message.tool_calls
    assert call.type == "function"
    assert (call.function.name, [*json.loads(call.function.arguments)]) == ("get_weather", ["city"])
    assert not whole.message.content
    ended = "tool_calls" if isinstance(choice, str) else "stop"  # as with OpenAI where a function is named
    assert whole.finish_reason == ended
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or []]
    assert [delta.function.name for delta in deltas if delta.function and delta.function.name] == ["get_weather"]
    assert "".join(delta.function.arguments or "" for delta in deltas if delta.function) == call.function.arguments
    assert not "".join(chunk.delta.content or "" for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [ended]


def test_names_that_are_its_own(installed: Callable[[str], Environment]) -> None:
    """Of parsers and ranks, asked of the one that is installed."""
    code = (
        "import json; from typing import get_args\n"
        "from vllm.config.lora import MaxLoRARanks\nfrom vllm.tool_parsers import ToolParserManager as m\n"
        "print(json.dumps([[*m.lazy_parsers, *m.tool_parsers], get_args(MaxLoRARanks)]))"
    )
    command = [str(installed("vllm").python), "-I", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parsers, ranks = json.loads(said.splitlines()[-1])
    assert set(PARSERS.values()) <= set(parsers)
    assert set(RANKS) <= set(ranks)


def test_structured_outputs_are_vllms_own(nano: Nano) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "Is the sky blue?"}],
        "temperature": 0,
        "structured_outputs": {"choice": ["yes, it is", "no, never"]},
    }
    answer = nano.http.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"] in ("yes, it is", "no, never")


def test_no_request_is_lost_when_the_engine_is_killed_under_load(nano: Nano) -> None:
    def engine() -> int:
        """The process of `vllm serve`."""
        commands = {int(f.parent.name): words(f) for f in Path("/proc").glob("[0-9]*/cmdline")}
        (found,) = (pid for pid, said in commands.items() if said[1:2] == [str(nano.python.with_name("vllm"))])
        return found

    def words(file: Path) -> list[str]:
        try:
            return file.read_text().split("\0")
        except OSError:  # it has ended
            return []

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=nano.url, timeout=300) as client:
            body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 200, "ignore_eos": True}
            models = ["base", "a", "b", "c"]
            asked = [
                asyncio.create_task(client.post("/v1/chat/completions", json={**body, "model": models[i % 4]}))
                for i in range(24)
            ]
            await asyncio.sleep(0.5)
            os.kill(engine(), signal.SIGKILL)
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == [200] * 24
    assert nano.http.get("/health").json()["failed_steps"] == 1


def test_nothing_is_left_when_the_gateway_is_killed(installed: Callable[[str], Environment], tmp_path: Path) -> None:
    options = ["--backend", "vllm", "--env-python", str(installed("vllm").python), "--max-length", "512"]
    with suite_serve(tmp_path, "--model", NANO, *options, "--no-probe") as running:
        started = descendants(running.process.pid)
        assert len(started) >= 3  # the guard, the server, and its engine
        running.process.kill()
        deadline = time.monotonic() + 30
        while left := [pid for pid in started if Path(f"/proc/{pid}/exe").exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in descendants(child))]


@pytest.fixture
def refused(installed: Callable[[str], Environment], tmp_path: Path) -> Callable[..., str]:
    """Why a server did not start."""
    python = installed("vllm").python

    def start(model: Path = NANO, adapters: dict[str, Path] | None = None, **options: Any) -> str:
        given = {"env_python": str(python), "max_length": 512, **options}
        with pytest.raises(SuiteError) as failed, endpoint(model, adapters, backend="vllm", **given):
            pass
        return str(failed.value)

    return start


def test_an_adapter_that_the_engine_ignores_is_refused(
    refused: Callable[..., str], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The probe knows adapter a; what vLLM is given under the name is one that adds nothing."""
    empty = tmp_path / "a"
    empty.mkdir()
    for file in adapters["a"].iterdir():
        (empty / file.name).write_bytes(file.read_bytes())
    weights = load_file(empty / "adapter_model.safetensors")
    save_file({k: v * ("lora_A" in k) for k, v in weights.items()}, empty / "adapter_model.safetensors")
    known = references(NANO, {"a": adapters["a"]})
    assert known
    from suite import store

    kept = store.Store(store.home())
    from serve import probe

    real, fake = (probe._file(kept.digest(NANO), kept.digest(folder)) for folder in (adapters["a"], empty))
    fake.write_bytes(real.read_bytes())
    said = refused(adapters={"a": empty})
    assert "the adapter 'a' has no effect in this engine" in said
    assert "--no-probe" in said


def test_another_chat_template_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    template = load_tokenizer(NANO).chat_template.replace("<|im_start|>assistant", "<|im_start|>assistant ")
    file = tmp_path / "other.jinja"
    file.write_text(template)
    said = refused(extra={"chat-template": str(file)})
    assert "reads other tokens for 'Who are you?'" in said


def test_what_vllm_refuses_is_its_last_words(refused: Callable[..., str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in NANO.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(
        json.dumps({**config, "architectures": ["NoSuchModel"], "model_type": "nothing"})
    )
    said = refused(broken, probe=False)
    assert "nothing" in said
    assert "could not start" in said


def test_memory_that_is_not_there_is_named_with_what_to_lower(refused: Callable[..., str]) -> None:
    said = refused(cache_memory=9000 * 2**30, probe=False)
    assert "requested memory for kv (9000.0 GiB)" in said
    assert "hint: lower --memory or --cache-memory" in said


def test_its_own_parser_refuses_unknown_options(refused: Callable[..., str]) -> None:
    said = refused(extra={"max-num-seqz": 4})
    assert "did you mean '--max-num-seqs'?" in said


def test_an_interpreter_without_it_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    missing = tmp_path / "bin" / "python"
    with (
        pytest.raises(SuiteError, match="no such interpreter"),
        endpoint(NANO, backend="vllm", env_python=str(missing)),
    ):
        pass
    with (
        pytest.raises(SuiteError, match="vllm"),
        endpoint(NANO, backend="vllm", env_python=sys.executable, probe=False),
    ):
        pass
    assert time.monotonic() - began < 60
