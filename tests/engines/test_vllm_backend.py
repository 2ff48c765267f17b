"""The real vLLM behind our gateway: the probe's judgement, adapters that come and go, death under load, why it fails.

What its endpoint answers is in tests/contract, which runs over it too where its environment is installed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from serve import probe
from serve.backends import endpoint
from serve.probe import references
from suite import envs, store
from suite.chat import load_tokenizer
from suite.envs import Environment
from suite.errors import SuiteError
from tests.engines.conftest import descendants
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
    offered: Path
    """A folder from which adapters may be loaded; d lies in it."""

    def answer(self, model: str, prompt: list[int]) -> list[int]:
        body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, **ALL}
        found = self.http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["token_ids"]
        return list(found)

    def change(self, what: str, **body: Any) -> httpx.Response:
        """Load or unload an adapter."""
        return self.http.post(f"/v1/{what}_lora_adapter", json=body)


@pytest.fixture(scope="module")
def nano(
    installed: Callable[[str], Environment],
    adapters: dict[str, Path],
    new_home: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Nano]:
    python = installed("vllm").python
    offered = tmp_path_factory.mktemp("offered")
    shutil.copytree(adapters["d"], offered / "d")
    started = {name: adapters[name] for name in "abc"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_HOME", str(new_home(tmp_path_factory.mktemp("nano") / "home")))
        options: dict[str, Any] = {"env_python": str(python), "max_length": 1024, "lora_dir": [str(offered)]}
        with (
            endpoint(NANO, started, backend="vllm", **options) as running,
            httpx.Client(base_url=running.url, timeout=120) as http,
        ):
            yield Nano(http, running.url, python, offered)


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

    nano.change("load", lora_name="e", lora_path="d").raise_for_status()
    assert nano.answer("e", prompt) == nano.answer("d", prompt)
    assert nano.change("load", lora_name="e", lora_path=str(adapters["a"])).status_code == 400  # lies elsewhere
    nano.change("unload", lora_name="e").raise_for_status()
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


def test_structured_outputs_are_vllms_own(nano: Nano) -> None:
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "Is the sky blue?"}],
        "temperature": 0,
        "structured_outputs": {"choice": ["yes, it is", "no, never"]},
    }
    answer = nano.http.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert answer["choices"][0]["message"]["content"] in ("yes, it is", "no, never")


def words(pid: int) -> list[str]:
    """The command line of a process, empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def server_of(nano: Nano) -> int:
    """The process of `vllm serve`."""
    command = str(nano.python.with_name("vllm"))
    (found,) = (pid for pid in descendants(os.getpid()) if words(pid)[1:2] == [command])
    return found


def test_no_request_is_lost_when_the_server_is_killed_under_load(nano: Nano) -> None:
    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=nano.url, timeout=300) as client:
            body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 200, "ignore_eos": True}
            models = ["base", "a", "b", "c"]
            asked = [
                asyncio.create_task(client.post("/v1/chat/completions", json={**body, "model": models[i % 4]}))
                for i in range(24)
            ]
            await asyncio.sleep(0.5)
            os.kill(server_of(nano), signal.SIGKILL)
            return [answer.status_code for answer in await asyncio.gather(*asked)]

    deaths = nano.http.get("/health").json()["failed_steps"]
    assert asyncio.run(ask()) == [200] * 24
    assert nano.http.get("/health").json()["failed_steps"] == deaths + 1


def test_no_request_is_lost_when_the_process_that_computes_is_killed(nano: Nano) -> None:
    """As the system does where memory runs out. The server in front of it fails what it has, and ends seconds later."""
    (core,) = (pid for pid in descendants(server_of(nano)) if words(pid)[0].startswith("VLLM::EngineCore"))

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=nano.url, timeout=300) as client:
            body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 20, "ignore_eos": True}
            os.kill(core, signal.SIGSTOP)  # so that nothing was sent to anybody when it dies
            bodies = [{**body, "model": "abc"[i % 3], "stream": i % 2 == 0} for i in range(24)]
            asked = [asyncio.create_task(client.post("/v1/chat/completions", json=each)) for each in bodies]
            health: dict[str, Any] = {}
            async with asyncio.timeout(60):
                while health.get("running", 0) + health.get("waiting", 0) < len(asked):
                    health = (await client.get("/health")).json()
            os.kill(core, signal.SIGKILL)
            return await asyncio.gather(*asked)

    deaths = nano.http.get("/health").json()["failed_steps"]
    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * 24
    assert all(a.text.endswith("data: [DONE]\n\n") and '"error"' not in a.text for a in answers[::2])
    assert nano.http.get("/health").json()["failed_steps"] == deaths + 1


def test_an_adapter_that_the_engine_ignores_is_refused(nano: Nano, adapters: dict[str, Path]) -> None:
    """The probe knows adapter a; what vLLM is given in its place adds nothing."""
    empty = nano.offered / "empty"
    shutil.copytree(adapters["a"], empty)
    weights = load_file(empty / "adapter_model.safetensors")
    save_file({k: v * ("lora_A" in k) for k, v in weights.items()}, empty / "adapter_model.safetensors")
    assert references(NANO, {"a": adapters["a"]})
    kept = store.Store(store.home())
    real, fake = (probe._file(kept.digest(NANO), kept.digest(folder)) for folder in (adapters["a"], empty))
    fake.write_bytes(real.read_bytes())
    refused = nano.change("load", lora_name="e", lora_path="empty")
    assert refused.status_code == 400
    assert "the adapter 'e' has no effect in this engine" in refused.text
    assert "e" not in {card["id"] for card in nano.http.get("/v1/models").json()["data"]}


def refusal(python: Path, model: Path = NANO, **options: Any) -> str:
    """Why a server did not start."""
    given = {"env_python": str(python), "max_length": 512, **options}
    with pytest.raises(SuiteError) as failed, endpoint(model, backend="vllm", **given):
        pass
    return str(failed.value)


def test_another_chat_template_is_refused(installed: Callable[[str], Environment], tmp_path: Path) -> None:
    template = load_tokenizer(NANO).chat_template.replace("<|im_start|>assistant", "<|im_start|>assistant ")
    file = tmp_path / "other.jinja"
    file.write_text(template)
    said = refusal(installed("vllm").python, extra={"chat-template": str(file)})
    assert "reads other tokens for 'Who are you?'" in said
    assert "--no-probe" in said


@pytest.fixture(scope="module")
def refusals(
    installed: Callable[[str], Environment], new_home: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Why servers did not start that were started at the same time, by what was wrong with each."""
    root, python = tmp_path_factory.mktemp("refused"), installed("vllm").python
    broken = shutil.copytree(NANO, root / "broken")
    config = json.loads((NANO / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["No"], "model_type": "nothing"}))
    wrong: dict[str, Callable[[], str]] = {
        "model": partial(refusal, python, broken, probe=False),
        "memory": partial(refusal, python, cache_memory=9000 * 2**30, probe=False),
        "option": partial(refusal, python, extra={"max-num-seqz": 4}),
    }
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor() as pool:
        patch.setenv("SUITE_HOME", str(new_home(root / "home")))
        started = {name: pool.submit(start) for name, start in wrong.items()}
        return {name: future.result() for name, future in started.items()}


def test_what_vllm_refuses_is_its_last_words(refusals: dict[str, str]) -> None:
    assert "nothing" in refusals["model"]
    assert "could not start" in refusals["model"]


def test_memory_that_is_not_there_is_named_with_what_to_lower(refusals: dict[str, str]) -> None:
    assert "requested memory for kv (9000.0 GiB)" in refusals["memory"]
    assert "hint: lower --memory or --cache-memory" in refusals["memory"]


def test_its_own_parser_refuses_unknown_options(refusals: dict[str, str]) -> None:
    assert "did you mean '--max-num-seqs'?" in refusals["option"]


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
