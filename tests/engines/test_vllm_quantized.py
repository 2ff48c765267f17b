"""Quantized models in the real vLLM on the CPU: what it loads answers as transformers does; what it refuses is named.

docs/quantization.md says what was seen; this keeps it true.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from export.quantizers import calibration
from export.quantizers.recipe import METHODS, Blocks, Recipe
from serve.backends import endpoint
from serve.settings import Settings
from suite import processes, quantized
from suite.chat import Chat
from suite.envs import Environment
from suite.errors import SuiteError

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
CHATS = NANO.parents[1] / "data" / "calibration.jsonl"
START_SECONDS = 240  # on two cores with other work
QUESTIONS = ("What is the capital of France?", "Who are you?", "中国的首都是哪座城市？", "What colour is a carrot?")
WHOLE = {f"model.layers.0.mlp.{name}_proj": 16 for name in ("gate", "up", "down")}
SERVED = {
    "gptq": Recipe("gptq", 4, widths=WHOLE),
    "awq": Recipe("awq", 4),
    "w4a16": Recipe("w4a16", 4),
    "w8a8": Recipe("w8a8", 8),
}
PLAIN = Recipe("gptq", 4)
REFUSED = {"nf4": (Recipe("bnb", 4), "Unknown quantization method: bitsandbytes")}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
REFUSED_AT_ONCE = {
    "8 bits": ({"bits": 8}, "Marlin does not support weight_bits = uint8b128"),
    "3 bits": ({"bits": 3}, "Unsupported quantization config: bits=3, sym=True"),
    "2 bits": ({"bits": 2}, "Unsupported quantization config: bits=2, sym=True"),
    "zeros": ({"sym": False}, "Unsupported quantization config: bits=4, sym=False"),
    "desc_act": ({"desc_act": True}, "desc_act=True) is no longer supported"),
    "as it is written": ({}, ""),
}
"""How the settings of GPTQ differ, and what vLLM says of them."""
ASK = """
import json, sys
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig, AutoGPTQLinearMethod
found = []
for settings in json.load(sys.stdin):
    try:
        AutoGPTQLinearMethod(AutoGPTQConfig.from_config(settings))
        found.append("")
    except ValueError as error:
        found.append(str(error))
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def vllm(installed: Callable[[str], Environment]) -> Path:
    """The `vllm` command."""
    return installed("vllm").python.with_name("vllm")


@pytest.fixture(scope="module")
def make(
    installed: Callable[[str], Environment], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Recipe], Path]:
    """Makes nano smaller by a recipe; returns the folder."""
    blocks: Blocks = calibration.draw(NANO, [CHATS], {}, samples=256, length=256, seed=0).blocks
    root = tmp_path_factory.mktemp("made")

    def quantize(name: str, recipe: Recipe) -> Path:
        python = installed(environment).python if (environment := METHODS[recipe.method].environment) else None
        folder = root / name / "out"
        if folder.is_dir():
            return folder
        folder.mkdir(parents=True)
        replace(recipe, python=python).make(NANO, folder, blocks, lambda *_: None)
        return folder

    return quantize


@contextlib.contextmanager
def server(vllm: Path, folder: Path, log: Path) -> Iterator[str]:
    """The URL of vLLM with `folder` as model `m`; fails the block with its last lines where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [
        str(vllm), "serve", str(folder), "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "bfloat16", "--max-model-len", "512", "--enforce-eager",
    ]  # fmt: skip
    with log.open("wb") as file, processes.group(command, file, file) as process:
        deadline = time.monotonic() + START_SECONDS
        while not ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(log.read_text("utf-8", "replace"))
            time.sleep(0.5)
        yield url
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(autouse=True)
def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    for name, value in {**given, "OMP_NUM_THREADS": str(os.cpu_count())}.items():
        monkeypatch.setenv(name, value)


def answers_here(folder: Path) -> list[str]:
    """Greedy answers of transformers, in the dtype that vLLM is told."""
    chat = Chat.load(folder)
    model: Any = quantized.load(folder, dtype=torch.bfloat16).eval()
    found = []
    with torch.compiler.set_stance("force_eager"):
        for question in QUESTIONS:
            ids = chat.ids([{"role": "user", "content": question}], generate=True)
            made = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
            found.append(chat.tokenizer.decode(made, skip_special_tokens=True))
    return found


def answers_there(url: str) -> list[str]:
    found = []
    for question in QUESTIONS:
        body = {"model": "m", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=300).raise_for_status().json()
        found.append(answer["choices"][0]["message"]["content"])
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SERVED)
def test_vllm_answers_as_transformers_does(
    name: str, vllm: Path, make: Callable[[str, Recipe], Path], tmp_path: Path
) -> None:
    folder = make(name, SERVED[name])
    with server(vllm, folder, tmp_path / "log") as url:
        there = answers_there(url)
    assert there == answers_here(folder)
    assert "Paris" in there[0]


@pytest.mark.timeout(900)
def test_the_gateway_serves_them_and_its_probe_has_nothing_against_them(
    vllm: Path, make: Callable[[str, Recipe], Path]
) -> None:
    options: dict[str, Any] = {
        "backend": "vllm", "env_python": str(vllm.with_name("python")), "max_length": 512, "cache_memory": 2**30,
    }  # fmt: skip
    other = Settings(model=make("w8a8", SERVED["w8a8"]), name="w8a8", **options)
    with (
        endpoint(make("plain", PLAIN), name="gptq", beside=(other,), **options) as running,
        httpx.Client(base_url=f"{running.url}/v1", timeout=300) as http,
    ):
        for name in ("gptq", "w8a8"):
            body = {"model": name, "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0}
            answer = http.post("/chat/completions", json=body).raise_for_status().json()
            assert "Paris" in answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_would_refuse_is_refused_before_it_is_started(
    name: str, make: Callable[[str, Recipe], Path], vllm: Path
) -> None:
    settings = Settings(model=make(name, REFUSED[name][0]), backend="vllm", env_python=str(vllm.with_name("python")))
    with pytest.raises(SuiteError, match="vLLM cannot serve"):
        settings.check()


def test_settings_of_gptq_that_vllm_refuses_when_it_reads_them(vllm: Path, tmp_path: Path) -> None:
    asked = [{**GPTQ, **changed} for changed, _ in REFUSED_AT_ONCE.values()]
    answers = tmp_path / "answers.json"
    command = [str(vllm.with_name("python")), "-c", ASK, str(answers)]
    subprocess.run(command, input=json.dumps(asked), text=True, check=True, capture_output=True)
    for (changed, said), found in zip(REFUSED_AT_ONCE.values(), json.loads(answers.read_text()), strict=True):
        assert said in found, changed
        assert bool(said) == bool(found)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", REFUSED)
def test_vllm_refuses_what_it_has_no_kernel_for(
    name: str, vllm: Path, make: Callable[[str, Recipe], Path], tmp_path: Path
) -> None:
    recipe, said = REFUSED[name]
    folder = make(name, recipe)
    with pytest.raises(RuntimeError, match=said), server(vllm, folder, tmp_path / "log"):
        pass
