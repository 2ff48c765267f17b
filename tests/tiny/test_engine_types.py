"""In short types the engine's numbers are those of PEFT in the same type, up to its rounding: alone and in a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serve.generation import Generation, Request
from serve.torch.engine import Engine
from tests.tiny.tiny_models import tiny_adapter, tiny_model

NEW = 10
ADAPTERS = ("a", "b")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("types")
    base = tiny_model(root / "base", std=0.05)
    return {"": base, **{name: tiny_adapter(base, root / name, seed=i) for i, name in enumerate(ADAPTERS)}}


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(folders[""], {name: folders[name] for name in ADAPTERS}, dtype=request.param, max_batch=8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 512) for _ in range(rng.randrange(20, 50))] for _ in range(6)]
    names = ("", *ADAPTERS)
    return [Request(p, names[i % 3], NEW, logprobs=0, prompt_logprobs=0) for i, p in enumerate(prompts)]


def reference(engine: Engine, folders: dict[str, Path], adapter: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folders[""], dtype=engine.model.dtype, attn_implementation="eager")
    if adapter:
        model = PeftModel.from_pretrained(model, folders[adapter], autocast_adapter_dtype=False)
    return model.eval()


def check(engine: Engine, folders: dict[str, Path], generations: list[Generation]) -> None:
    """Every log probability is near the reference's, and every greedy token its likeliest, or as good as that."""
    tolerance = 16 * torch.finfo(engine.model.dtype).eps
    for name in {generation.request.adapter for generation in generations}:
        model = reference(engine, folders, name)
        for generation in (g for g in generations if g.request.adapter == name):
            with torch.no_grad():
                wanted = model(torch.tensor([generation.tokens])).logits[0].float().log_softmax(-1)[:-1]
            given = torch.tensor([scored.logprob for scored in [*generation.prompt_scores, *generation.scores]])
            exact = wanted.gather(1, torch.tensor(generation.tokens)[1:, None])[:, 0]
            torch.testing.assert_close(given, exact[-len(given) :], atol=tolerance, rtol=tolerance)
            assert (exact >= wanted.amax(1) - 2 * tolerance)[-NEW:].all()


def test_base_and_adapters_in_one_batch(engine: Engine, folders: dict[str, Path], asked: list[Request]) -> None:
    check(engine, folders, engine.generate(asked))
    check(engine, folders, [engine.generate([request])[0] for request in asked[:3]])
    assert len({tuple(g.new) for g in engine.generate([Request(asked[0].prompt, n, NEW) for n in ("", "a", "b")])}) == 3


def test_what_is_copied_from_earlier_prompts(engine: Engine, folders: dict[str, Path], asked: list[Request]) -> None:
    plain = [replace(request, prompt_logprobs=None) for request in asked]
    engine.generate(plain)
    again = engine.generate(plain)
    assert all(generation.reused >= 16 for generation in again)
    check(engine, folders, again)
