"""Prompts that begin alike are read once, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModelForCausalLM

from serve.generation import Generation, Request
from serve.torch.cache import SlotCache
from serve.torch.engine import PREFIX_BLOCK, Engine
from serve.torch.scheduler import Move
from tests.tiny.tiny_models import tiny_adapter, tiny_model

VOCABULARY = 512
NEW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prefix")
    base = tiny_model(root / "base", architecture="mistral", sliding_window=48)
    return {"base": base, "a": tiny_adapter(base, root / "a"), "b": tiny_adapter(base, root / "b", seed=2)}


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(folders["base"], {name: folders[name] for name in "ab"}, max_batch=8)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Iterator[Engine]:
    """One that keeps nothing."""
    engine = Engine(folders["base"], {name: folders[name] for name in "ab"}, max_batch=8, prefix_cache=False)
    yield engine
    engine.close()


def text(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCABULARY) for _ in range(length)]


def hits(engine: Engine, requests: list[Request]) -> tuple[list[Generation], int]:
    """The generations, and how many tokens of their prompts were not read."""
    before = engine.stats().prefix_hits
    return engine.generate(requests), engine.stats().prefix_hits - before


def test_a_shared_beginning_is_read_once_for_each_adapter(engine: Engine, plain: Engine) -> None:
    system = text(10 * PREFIX_BLOCK + 5, 0)
    requests = [Request(system + text(20, i), ("", "a", "b")[i % 3], NEW) for i in range(1, 13)]
    wanted = [generation.new for generation in plain.generate(requests)]
    assert plain.stats().prefix_cells == plain.stats().prefix_hits == 0
    first = [engine.generate([request])[0].new for request in requests[:3]]
    assert engine.stats().prefix_hits == 0
    rest, found = hits(engine, requests[3:])
    assert found == 9 * 10 * PREFIX_BLOCK
    assert [generation.reused for generation in rest] == [10 * PREFIX_BLOCK] * 9
    assert [*first, *[generation.new for generation in rest]] == wanted


def test_a_chat_reads_only_what_is_new_of_each_turn(engine: Engine, plain: Engine) -> None:
    history: list[int] = []
    for turn in range(5):
        known = max(0, len(history) - 1)  # the last token was made, and never read
        history += text(13, turn)
        (generation,), found = hits(engine, [Request(history, "a", NEW)])
        assert found == known // PREFIX_BLOCK * PREFIX_BLOCK
        assert generation.new == plain.generate([Request(history, "a", NEW)])[0].new
        history = generation.tokens


def test_another_adapter_of_the_same_name_takes_nothing_of_the_first(
    engine: Engine, plain: Engine, folders: dict[str, Path]
) -> None:
    prompt = text(100, 0)
    old = engine.generate([Request(prompt, "a", NEW)])[0].new
    engine.load_adapter("a", folders["b"])
    (new,), found = hits(engine, [Request(prompt, "a", NEW)])
    assert found == 0
    assert new.new == plain.generate([Request(prompt, "b", NEW)])[0].new != old


def test_what_must_be_scored_is_read(engine: Engine, plain: Engine) -> None:
    request = Request(text(100, 3), "", 4, prompt_logprobs=0)
    engine.generate([request])
    (again,), found = hits(engine, [request])
    assert found == 0
    wanted = plain.generate([request])[0]
    assert [scored.token for scored in again.prompt_scores] == request.prompt[1:]
    assert [scored.logprob for scored in again.prompt_scores] == pytest.approx(
        [scored.logprob for scored in wanted.prompt_scores], abs=1e-4
    )


def test_little_room_for_rows_and_beginnings_changes_nothing(folders: dict[str, Path], plain: Engine) -> None:
    engine = Engine(folders["base"], {name: folders[name] for name in "ab"}, max_batch=16, cache_memory=0)
    system = text(50, 0)
    requests = [
        Request(
            (system if i % 2 else []) + text(1 + i % 40, i),
            ("", "a", "b")[i % 3],
            120,
            prompt_logprobs=[0, None][i % 2],
        )
        for i in range(16)
    ]
    requests += [replace(request, prompt_logprobs=None, max_tokens=0, embed="mean") for request in requests[:8]]
    try:
        stats = engine.stats()
        assert (stats.cells, stats.prefix_cells) == (768, 256)
        given = engine.generate(requests)
        stats = engine.stats()
    finally:
        engine.close()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert (stats.running, stats.waiting, stats.cells_used) == (0, 0, 0)
    for mine, theirs in zip(given, plain.generate(requests), strict=True):
        assert mine.new == theirs.new
        assert len(mine.prompt_scores) == len(theirs.prompt_scores)
        assert [scored.logprob for scored in mine.prompt_scores] == pytest.approx(
            [scored.logprob for scored in theirs.prompt_scores], abs=1e-4
        )
        assert mine.embedding == pytest.approx(theirs.embedding, abs=1e-5)


@pytest.mark.parametrize("adapter", ["", "a"])
def test_embeddings_are_the_pooled_last_hidden_states(engine: Engine, folders: dict[str, Path], adapter: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).eval()
    if adapter:
        model = PeftModel.from_pretrained(model, folders[adapter]).eval()
    engine.scheduler.chunk = 32
    prompts = [text(length, length) for length in (1, 15, 40, 100)]
    mixed = [Request(prompt, adapter, embed=how) for prompt in prompts for how in ("mean", "last")]
    mixed += [Request(prompt, "b", NEW) for prompt in prompts]
    for _ in range(2):  # the second time "last" finds the beginning
        given = engine.generate(mixed)
    assert engine.stats().prefix_hits > 0
    for prompt, mean, last in zip(prompts, given[:8:2], given[1:8:2], strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
        for mine, wanted in ((mean, hidden.mean(0)), (last, hidden[-1])):
            assert mine.embedding == pytest.approx(normalize(wanted, dim=0).tolist(), abs=1e-5)
            assert (mine.new, mine.finish) == ([], "length")
    assert cosine_similarity(torch.tensor(given[0].embedding), torch.tensor(given[6].embedding), dim=0) < 0.99


def test_rows_move_to_where_room_is_made_and_from_where_none_is_left() -> None:
    cache = SlotCache(0, 1)
    cache.arrange([], 2, 4)
    cache.begin(0, [0, 0], 3, torch.device("cpu"))
    given = torch.arange(24.0).view(2, 1, 3, 4)  # (rows, heads, tokens, size)
    cache.update(given, given, 0)
    cache.arrange([Move(1, 3, 3)], 4, 4)
    assert torch.equal(cache.keys[0][3, :, :3], given[1])
    cache.arrange([Move(3, 0, 3)], 1, 200)
    assert len(cache.keys[0]) == 1
    assert torch.equal(cache.values[0][0, :, :3], given[1])
