"""Quantized models in the real vLLM on the CPU, behind our gateway and its probe: it answers as transformers does.

docs/quantization.md says what was seen; this keeps it true. What vLLM refuses is in test_vllm_itself.py.
"""

from __future__ import annotations

from collections.abc import Callable
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
from suite import quantized
from suite.chat import Chat
from suite.envs import Environment

NANO = Path(__file__).parents[2] / "examples" / "nano" / "model"
CHATS = NANO.parents[1] / "data" / "calibration.jsonl"
QUESTIONS = ("What is the capital of France?", "Who are you?", "中国的首都是哪座城市？", "What colour is a carrot?")
WHOLE = {f"model.layers.0.mlp.{name}_proj": 16 for name in ("gate", "up", "down")}
RECIPES = {
    "gptq": Recipe("gptq", 4, widths=WHOLE),
    "awq": Recipe("awq", 4),
    "w4a16": Recipe("w4a16", 4),
    "w8a8": Recipe("w8a8", 8),
}
TOGETHER = (("gptq", "awq"), ("w4a16", "w8a8"))
"""Which stand behind one gateway: two, so that their memory is there on most machines."""


@pytest.fixture(scope="module")
def make(installed: Callable[[str], Environment], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes nano smaller by a recipe; returns the folder."""
    blocks: Blocks = calibration.draw(NANO, [CHATS], {}, samples=256, length=256, seed=0).blocks
    root = tmp_path_factory.mktemp("made")

    def quantize(name: str) -> Path:
        recipe = RECIPES[name]
        python = installed(environment).python if (environment := METHODS[recipe.method].environment) else None
        folder = root / name / "out"
        folder.mkdir(parents=True)
        replace(recipe, python=python).make(NANO, folder, blocks, lambda *_: None)
        return folder

    return quantize


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


def answers_there(url: str, name: str) -> list[str]:
    found = []
    for question in QUESTIONS:
        body = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).raise_for_status().json()
        found.append(answer["choices"][0]["message"]["content"])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", TOGETHER, ids="-".join)
def test_vllm_answers_as_transformers_does(
    names: tuple[str, ...], installed: Callable[[str], Environment], make: Callable[[str], Path]
) -> None:
    """Both are probed first, and their model is what the gateway says it is."""
    options: dict[str, Any] = {
        "backend": "vllm", "env_python": str(installed("vllm").python), "max_length": 512, "cache_memory": 2**30,
    }  # fmt: skip
    folders = {name: make(name) for name in names}
    first, *others = (Settings(model=folder, name=name, **options) for name, folder in folders.items())
    with endpoint(first.model, name=first.name, beside=tuple(others), **options) as running:
        there = {name: answers_there(running.url, name) for name in names}
    assert there == {name: answers_here(folder) for name, folder in folders.items()}
    assert all("Paris" in answers[0] for answers in there.values())
