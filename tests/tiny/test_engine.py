"""The engine gives what `generate` gives: alone, in a batch, with any adapter, for windows and for capped attention."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serve.generation import Generation, Request, Sampling
from serve.torch.engine import Engine
from suite.errors import SuiteError
from tests.tiny.tiny_models import greedy, tiny_adapter, tiny_model

VOCABULARY = 512
NEW = 16
generate = partial(greedy, new=NEW)
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4},
    "attention": {"rank": 8, "target_modules": ["q_proj", "v_proj", "o_proj"], "use_rslora": True},
    "patterns": {"rank": 2, "alpha_pattern": {"up_proj": 5}, "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    base = tiny_model(root / "base")
    adapters = {n: tiny_adapter(base, root / n, seed=i, **how) for i, (n, how) in enumerate(ADAPTERS.items(), 1)}
    return {"base": base, **adapters}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(folders["base"], {name: folders[name] for name in ADAPTERS}, max_batch=8)
    yield engine
    engine.close()


def prompts(count: int, longest: int = 90, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def reference(folders: dict[str, Path], adapter: str = "") -> Any:
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    return (PeftModel.from_pretrained(model, folders[adapter]) if adapter else model).eval()


def tokens(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [generation.new for generation in engine.generate(requests)]


@pytest.mark.parametrize("adapter", ["", *ADAPTERS])
def test_greedy_is_generate(engine: Engine, folders: dict[str, Path], adapter: str) -> None:
    model = reference(folders, adapter)
    asked = prompts(6, seed=len(adapter))
    given = tokens(engine, [Request(prompt, adapter, NEW) for prompt in asked])
    assert given == [generate(model, prompt) for prompt in asked]


def test_adapters_mixed_in_one_batch_are_as_apart(engine: Engine) -> None:
    names = ["", *ADAPTERS]
    requests = [Request(prompt, names[i % 4], NEW) for i, prompt in enumerate(prompts(16))]
    together = tokens(engine, requests)
    assert together == [tokens(engine, [request])[0] for request in requests]
    one_prompt = tokens(engine, [replace(requests[0], adapter=name) for name in names])
    assert len(set(map(tuple, one_prompt))) == len(names), "the adapters change nothing"


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16, "attn_logit_softcapping": 5.0}),
        ("gemma3_text", {"sliding_window": 16}),
        ("phi3", {"sliding_window": 16}),
        ("gpt2", {}),
        ("qwen2", {}),
        ("gemma", {}),
        ("granite", {"attention_multiplier": 0.3, "residual_multiplier": 0.5}),
        ("stablelm", {}),
        ("exaone4", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
        ("gpt_oss", {"num_local_experts": 4, "sliding_window": 16}),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 256, "attention_chunk_size": 16}),
    ],
)
def test_other_architectures(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    folder = tiny_model(tmp_path / architecture, architecture=architecture, **config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    engine = Engine(folder, max_batch=4)
    asked = prompts(6, longest=60)
    try:
        assert tokens(engine, [Request(prompt, "", NEW) for prompt in asked]) == [generate(model, p) for p in asked]
    finally:
        engine.close()


def test_adapters_of_a_mixture_of_experts(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    base = tiny_model(tmp_path / "moe", architecture="qwen2_moe", shared_expert_intermediate_size=64, **experts)
    targets = ["q_proj", "shared_expert.gate_proj", "shared_expert.down_proj"]
    folders = {"base": base, "a": tiny_adapter(base, tmp_path / "a", target_modules=targets)}
    engine = Engine(base, {"a": folders["a"]}, max_batch=4)
    asked = prompts(4, longest=30)
    try:
        given = tokens(engine, [Request(prompt, ("", "a")[i % 2], NEW) for i, prompt in enumerate(asked)])
    finally:
        engine.close()
    models = [reference(folders), reference(folders, "a")]
    assert given == [generate(models[i % 2], prompt) for i, prompt in enumerate(asked)]


def test_a_small_cache_and_small_chunks_change_nothing(folders: dict[str, Path], engine: Engine) -> None:
    requests = [Request(prompt, "", 150, prompt_logprobs=0) for prompt in prompts(8, longest=60)]
    cramped = Engine(folders["base"], max_batch=8)
    scheduler = cramped.scheduler
    scheduler.max_cells, scheduler.chunk, scheduler.budget = 512, 16, 32
    preempted = []
    preempt = scheduler._preempt
    scheduler._preempt = lambda: (preempted.append(1), preempt())[1]  # type: ignore[method-assign]
    try:
        got = cramped.generate(requests)
    finally:
        cramped.close()
    assert preempted, "the cache was large enough for all"
    wide = engine.generate(requests)
    assert [g.new for g in got] == [g.new for g in wide]
    for mine, theirs in zip(got, wide, strict=True):
        assert [s.logprob for s in mine.prompt_scores] == pytest.approx(
            [s.logprob for s in theirs.prompt_scores], abs=1e-4
        )


def test_keys_and_values_stay_within_their_memory(folders: dict[str, Path]) -> None:
    sizes = []

    def watch(_: Any) -> None:
        sizes.extend(keys.shape[0] * keys.shape[2] for keys in engine._forward.cache.keys.values())

    def join(_: int) -> bool:  # it is read while the first one decodes
        if not second:
            second.append(engine.submit(Request([5] * 400, "", 2)))
        return False

    second: list[Generation] = []
    engine = Engine(folders["base"], cache_memory=0, prefix_cache=False, notify=watch)
    try:
        first = engine.submit(Request([4] * 400, "", 8, stop=join)).wait(30)
        assert (first.finish, second[0].wait(30).finish) == ("length", "length")
    finally:
        engine.close()
    assert 800 < max(sizes) <= engine.scheduler.max_cells == 1024


def test_logprobs_are_those_of_the_model(engine: Engine, folders: dict[str, Path]) -> None:
    prompt = prompts(1, longest=60)[0]
    request = Request(prompt, "", 5, logprobs=3, prompt_logprobs=1)
    generation = engine.generate([request, *[Request(p, "all", 5, logprobs=9) for p in prompts(5)]])[0]
    with torch.no_grad():
        wanted = reference(folders)(torch.tensor([generation.tokens])).logits[0].log_softmax(-1)
    scores = [*generation.prompt_scores, *generation.scores]
    assert [s.token for s in scores] == generation.tokens[1:]
    for position, scored in enumerate(scores):
        assert scored.logprob == pytest.approx(float(wanted[position, scored.token]), abs=1e-4)
    assert all(len(s.top) == 3 for s in generation.scores)
    best = wanted[len(prompt) - 1].topk(3)
    assert [token for token, _ in generation.scores[0].top] == best.indices.tolist()
    assert [logprob for _, logprob in generation.scores[0].top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_scoring_alone_generates_nothing(engine: Engine) -> None:
    generation = engine.generate([Request([5, 6, 7], "", 0, prompt_logprobs=0)])[0]
    assert (generation.new, generation.finish, len(generation.prompt_scores)) == ([], "length", 2)


def test_sampling_depends_on_the_seed_and_on_no_neighbour(engine: Engine) -> None:
    prompt = [7, 8, 9]

    def drawn(seed: int, beside: int) -> list[int]:
        sampling = Sampling(temperature=1.0, top_p=0.9, top_k=50, seed=seed)
        noise = [Request(p, "all", NEW, Sampling(temperature=2.0)) for p in prompts(beside)]
        return tokens(engine, [*noise, Request(prompt, "", NEW, sampling)])[-1]

    assert drawn(1, 0) == drawn(1, 5)
    assert len({tuple(drawn(seed, 0)) for seed in range(4)}) > 1


def test_stop_ids_and_stop_functions_end_a_generation(engine: Engine) -> None:
    free = tokens(engine, [Request([3, 4, 5], "", NEW)])[0]
    stopped = engine.generate([Request([3, 4, 5], "", NEW, stop_ids=frozenset({free[5]}))])[0]
    assert stopped.finish == "stop"
    assert stopped.new == free[: free.index(free[5]) + 1]
    seen: list[int] = []
    told = engine.generate([Request([3, 4, 5], "", NEW, stop=lambda token: seen.append(token) or len(seen) == 3)])[0]
    assert (told.finish, told.new, seen) == ("stop", free[:3], free[:3])


def test_a_cancelled_generation_ends_and_leaves_no_row(engine: Engine) -> None:
    running = threading.Event()
    long = engine.submit(Request([3, 4, 5], "", 1500, stop=lambda _: running.set() or False))
    waiting = [engine.submit(Request([3, 4, 5], "", 1500)) for _ in range(12)]
    assert running.wait(30)
    for generation in [long, *waiting]:
        engine.cancel(generation)
    for generation in [long, *waiting]:
        assert generation.wait(30).finish == "cancelled"
    assert engine.generate([Request([3, 4, 5], "", 2)])[0].finish == "length"
    assert engine.load == (0, 0)


def test_a_failing_stop_function_fails_its_request_only(engine: Engine) -> None:
    def broken(_: int) -> bool:
        raise RuntimeError("injected")

    failed, other = engine.generate([Request([3, 4], "", 4, stop=broken), Request([3, 4], "", 4)])
    assert (failed.finish, other.finish) == ("error", "length")
    assert "injected" in failed.error


def test_a_failing_step_fails_what_ran_and_nothing_else(engine: Engine) -> None:
    wanted = tokens(engine, [Request([3, 4, 5], "", 4)])
    hook = engine.model.register_forward_pre_hook(lambda *_: 1 / 0)
    failed = engine.generate([Request([3, 4], "", 4)] * 3)
    hook.remove()
    assert [(generation.finish, "division" in generation.error) for generation in failed] == [("error", True)] * 3
    assert engine.alive
    assert engine.failures > 0
    assert tokens(engine, [Request([3, 4, 5], "", 4)]) == wanted


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "empty"),
        (Request([1] * 2048), "2048 tokens"),
        (Request([VOCABULARY]), "token ids"),
        (Request([1], "al"), "unknown adapter 'al'"),
    ],
)
def test_requests_that_can_never_run(engine: Engine, request_: Request, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        engine.submit(request_)


def test_the_longest_that_fits(engine: Engine) -> None:
    generation = engine.generate([Request([1] * 2040, "", 100)])[0]
    assert (generation.finish, len(generation.tokens)) == ("length", 2048)
