"""State-space and hybrid models: rows with a state are served as they answer alone, whatever comes and goes beside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve.folders import read_model
from serve.generation import Request
from serve.torch import loading, trial
from serve.torch.adapters import Adapters
from serve.torch.engine import Engine
from serve.torch.states import States
from suite.errors import SuiteError
from tests.tiny.tiny_models import greedy, tiny_adapter, tiny_model

NEW, POISON = 8, 511
generate = partial(greedy, new=NEW)
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_text": (
        "even",
        {
            "layer_types": ["linear_attention", "full_attention"],
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
            **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        },
    ),
    "lfm2": ("even", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "falcon_h1": ("even", {**MAMBA, "mamba_d_ssm": 256}),
    "mamba2": ("even", {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 8}),
    "jamba": ("whole", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8}),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_model(folder, architecture=request.param, **MODELS[request.param][1])


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(folder, max_batch=4)
    engine.scheduler.chunk = 16
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, POISON) for _ in range(length)] for length in lengths]


def test_served_as_generate_answers(engine: Engine, model: Any) -> None:
    """More prompts than rows, so that some begin where others ended, beside some that go on; then alone."""
    asked = prompts([1, 40, 17, 5, 40, 33])
    together = engine.generate([Request(p, "", NEW, prompt_logprobs=0 if i % 2 else None) for i, p in enumerate(asked)])
    assert [generation.new for generation in together] == [generate(model, prompt) for prompt in asked]
    assert engine.generate([Request(asked[1], "", NEW)])[0].new == together[1].new
    ids = torch.tensor([asked[5]])
    with torch.no_grad():
        wanted = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    given = torch.tensor([scored.logprob for scored in together[5].prompt_scores])
    torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)


def test_how_rows_are_read(engine: Engine, folder: Path) -> None:
    reading, _ = MODELS[read_model(folder).config["model_type"]]
    assert engine.scheduler.reading == reading
    # keys and values of a beginning are of no use without the state behind it
    assert engine.scheduler.prefixes.blocks == 0


def test_rows_that_are_preempted_or_close_a_gap(engine: Engine, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read anew begins with an empty state, and who takes another's row brings its own along."""
    monkeypatch.setattr(engine.scheduler, "max_cells", 200)
    monkeypatch.setattr(engine.scheduler, "block", 16)
    before = engine.scheduler.preemptions
    asked = [Request(p, "", new) for p, new in zip(prompts([12, 20, 33, 27], 1), [3, 40, 40, 40], strict=True)]
    with engine._wake:  # they come at once
        generations = [engine.submit(request) for request in asked]
    found = [generation.wait(60).new for generation in generations]
    assert engine.scheduler.preemptions > before
    assert found == [generate(model, request.prompt, new=request.max_tokens) for request in asked]


def test_long_prompts_that_are_read_at_once_are_not_scored(engine: Engine) -> None:
    long = Request([3] * (engine.scheduler.budget + 1), prompt_logprobs=0, max_tokens=1)
    if engine.scheduler.reading == "whole":
        with pytest.raises(SuiteError, match=f"only one of up to {engine.scheduler.budget} tokens can be scored"):
            engine.submit(long)
    else:
        engine.cancel(engine.submit(long))


def test_after_a_step_that_failed_all_states_are_new(engine: Engine, model: Any) -> None:
    def fail(_: Any, __: Any, given: dict[str, Any]) -> None:
        if (given["input_ids"] == POISON).any():
            raise ArithmeticError("injected")

    asked = prompts([20, 9], seed=3)
    hook = engine.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        *others, poisoned = engine.generate([*[Request(p, "", NEW) for p in asked], Request([3] * 40 + [POISON])])
    finally:
        hook.remove()
    assert poisoned.finish == "error"
    assert [other.new for other in others] == [generate(model, prompt) for prompt in asked]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("qwen3_5_text", ["in_proj_qkv", "q_proj", "out_proj"]), ("jamba", ["in_proj", "x_proj", "q_proj", "out_proj"])],
)
def test_adapters_beside_the_base(tmp_path: Path, kind: str, targets: list[str]) -> None:
    """Rows of both share steps; each gets what PEFT answers."""
    folder = tiny_model(tmp_path / "base", architecture=kind, **MODELS[kind][1])
    adapters = {n: tiny_adapter(folder, tmp_path / n, seed=i, target_modules=targets) for i, n in enumerate("ab")}
    names = ["", "a", "b", "a"]
    asked = [Request(p, name, NEW) for p, name in zip(prompts([21, 9, 21, 30], seed=2), names, strict=True)]
    engine = Engine(folder, adapters, max_batch=4)
    try:
        given = engine.generate(asked)
    finally:
        engine.close()
    models = {"": AutoModelForCausalLM.from_pretrained(folder).eval()}
    for name, adapter in adapters.items():
        models[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    wanted = [generate(models[request.adapter], request.prompt) for request in asked]
    assert [generation.new for generation in given] == wanted
    assert wanted[2] != generate(models[""], asked[2].prompt)


def test_an_adapter_of_a_layer_that_is_not_called_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "base", architecture="jamba", **MODELS["jamba"][1])
    adapter = tiny_adapter(folder, tmp_path / "a", target_modules=["dt_proj", "in_proj"])
    model = loading.load_model(read_model(folder), "float32")
    served = Adapters(model, read_model(folder), 1 << 30, lambda: None)
    with pytest.raises(SuiteError, match=r"model.layers.0.mamba.dt_proj would not be heeded"):
        served.check(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    unchanged = {name: t.zero_() if "dt_proj.lora_B" in name else t for name, t in tensors.items()}
    save_file(unchanged, adapter / "adapter_model.safetensors")
    assert served.check(adapter).path == adapter


@pytest.mark.parametrize("kind", ["mamba2", "jamba"])
@pytest.mark.parametrize("fault", ["begin", "move"])
def test_the_trial_sees_states_that_are_mixed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: str
) -> None:
    """Rows that begin with what another left, and rows that move without their state."""

    def begin(states: States, first: int, starts: list[int]) -> None:
        states.rows, states.known = slice(first, first + len(starts)), bool(states.layers)

    monkeypatch.setattr(States, fault, begin if fault == "begin" else lambda *_: None)
    with pytest.raises(SuiteError, match=r"logits differ by \d+"):
        loading.load_model(read_model(tiny_model(tmp_path, architecture=kind, **MODELS[kind][1])), "float32")


@pytest.mark.parametrize(("kind", "reading"), [("mamba2", "even"), ("jamba", "whole")])
def test_rounding_hides_nothing(tmp_path: Path, kind: str, reading: str) -> None:
    folder = read_model(tiny_model(tmp_path, architecture=kind, **MODELS[kind][1]))
    assert loading.load_model(folder, "bfloat16").found.reading == reading


def test_attention_that_several_layers_share(tmp_path: Path) -> None:
    """It is told which layer it is in each call, and so is not remade as one that knows."""
    folder = tiny_model(
        tmp_path,
        architecture="zamba2",
        layers=3,
        layers_block_type=["hybrid", "mamba", "hybrid"],
        hybrid_layer_ids=[0, 2],
        **{"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 32, "mamba_d_state": 16, "chunk_size": 8},
        **{"num_mem_blocks": 1, "use_mem_rope": True},
    )
    found = loading.load_model(read_model(folder), "float32").found
    assert (found.reading, found.token_bytes) == ("even", 2 * 2 * 2 * 32 * 4)


@pytest.mark.parametrize(
    ("token_bytes", "row_bytes", "rows", "cells"),
    [
        (10, 0, 8, 10_000),  # keys and values alone
        (10, 1000, 8, 9_200),  # the states of eight rows set aside
        (10, 10_000, 4, 6_000),  # of eight they would take more than half
        (0, 1000, 8, 8 * 64),  # no memory for tokens: each row may be as long as any
        (0, 10**6, 1, 64),
    ],
)
def test_memory_for_states(token_bytes: int, row_bytes: int, rows: int, cells: int) -> None:
    model = SimpleNamespace(found=trial.Found("even", token_bytes, row_bytes))
    assert loading.cache_room(model, 100_000, 8, 64) == (rows, cells)
