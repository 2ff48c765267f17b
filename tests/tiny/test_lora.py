"""Adapters of any kind, mixed in one batch, are what each is alone and what peft makes of it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve.generation import Request
from serve.torch.adapters import Adapters
from serve.torch.engine import Engine
from serve.torch.lora import MultiLora
from serve.torch.slot_layer import Layer, Plan, Turns
from serve.torch.slots import Slots, arrange
from suite.errors import SuiteError
from tests.tiny.tiny_models import greedy, tiny_adapter, tiny_model

NEW = 8
generate = partial(greedy, new=NEW)
KINDS: dict[str, dict[str, Any]] = {
    "one": {"rank": 1},
    "two": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
    "three": {"rank": 3, "use_rslora": True},
    "five": {"rank": 5, "target_modules": ["gate_proj", "down_proj"]},
    "eight": {"rank": 8, "target_modules": ["k_proj", "up_proj", "o_proj"]},
    "sixteen": {"rank": 16, "lora_alpha": 4},
    "head": {"rank": 4, "target_modules": ["lm_head", "up_proj"]},
    "patterns": {"rank": 2, "alpha_pattern": {"up_proj": 5}, "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    base = tiny_model(root / "base")
    made = {n: tiny_adapter(base, root / n, seed=i, **how) for i, (n, how) in enumerate(KINDS.items())}
    # as save_pretrained(save_embedding_layers=False) leaves it: without a copy of the base's head
    head = made["head"] / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(head).items() if ".lora_" in n}, head)
    return {"": base, **made}


@pytest.fixture(scope="module", params=["compiled", "slots"])
def engine(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Adapters where they lie, or in slots, as on a GPU and in short types."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "slots":
            patch.setattr("serve.torch.lora.Places", lambda: Slots(1 << 30))
        engine = Engine(folders[""], {name: folders[name] for name in KINDS}, max_batch=32, prefix_cache=False)
    yield engine
    engine.close()


in_slots = pytest.mark.parametrize("engine", ["slots"], indirect=True)


def prompts(count: int, longest: int = 30) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, 512) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def reference(base: Path, adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def tokens(engine: Engine, requests: list[Request]) -> list[list[int]]:
    with engine._wake:  # they come at once
        submitted = [engine.submit(request) for request in requests]
    done = [generation.wait(60) for generation in submitted]
    assert not {generation.error for generation in done} - {""}
    return [generation.new for generation in done]


def test_the_base_and_eight_adapters_in_one_batch_are_peft(engine: Engine, folders: dict[str, Path]) -> None:
    asked = prompts(3)
    requests = [Request(prompt, name, NEW) for prompt in asked for name in folders]
    together = tokens(engine, requests)
    assert together == [tokens(engine, [request])[0] for request in requests]
    assert together[: len(folders)] == tokens(engine, requests[: len(folders)]), "a row for each"
    for i, name in enumerate(folders):
        model = reference(folders[""], folders[name] if name else None)
        assert together[i :: len(folders)] == [generate(model, prompt) for prompt in asked], name
    assert len({tuple(new) for new in together[: len(folders)]}) == len(folders), "adapters that change nothing"


@pytest.fixture
def plans(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Plan | Turns | None]:
    """How layers were told to compute, from now on."""
    followed: list[Plan | Turns | None] = []
    follow = Layer.follow

    def watch(layer: Layer, plan: Plan | Turns | None) -> None:
        followed.append(plan)
        follow(layer, plan)

    monkeypatch.setattr(Layer, "follow", watch)
    return followed


def mixed_and_alone(engine: Engine, folders: dict[str, Path], names: list[str]) -> None:
    """Rows of the base and of adapters, called by their kind and a number, are what peft makes of each."""
    tokens(engine, [Request([3], name, 1) for name in {*names}])  # adapters are in memory: none waits for its own
    asked = prompts(len(names))
    together = tokens(engine, [Request(prompt, name, NEW) for prompt, name in zip(asked, names, strict=True)])
    for kind in {name.split()[0] if name else "" for name in names}:
        model = reference(folders[""], folders[kind] if kind else None)
        rows = [row for row, name in enumerate(names) if name.split()[:1] == [kind][: bool(kind)]]
        assert [together[row] for row in rows] == [generate(model, asked[row]) for row in rows], kind


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_more_or_fewer_rows_of_the_same_adapters(engine: Engine, folders: dict[str, Path], count: int) -> None:
    kinds = [*KINDS]
    names = [f"{kinds[i % len(kinds)]} {i}" for i in range(count)]
    for name in names:  # each a version of its own
        engine.load_adapter(name, folders[name.split()[0]])
    mixed_and_alone(engine, folders, [*names, names[0], *(["", *names] * 2), ""])
    for name in names:
        engine.unload_adapter(name)


@in_slots
def test_prompts_take_turns_and_tokens_are_gathered(
    engine: Engine, folders: dict[str, Path], plans: list[Plan | Turns | None]
) -> None:
    mixed_and_alone(engine, folders, ["one", "one", "two", "", "one", "two", "", "three"])
    assert any(isinstance(plan, Turns) for plan in plans)
    assert any(isinstance(plan, Plan) and plan.blocks < 6 for plan in plans), "several rows are a block"


def test_rows_join_others(engine: Engine) -> None:
    names = ["", *KINDS]
    requests = [Request(prompt, name, 20) for prompt, name in zip(prompts(len(names)), names, strict=True)]
    alone = [tokens(engine, [request])[0] for request in requests]
    others_came = threading.Event()
    early = [engine.submit(replace(request, stop=lambda _: not others_came.wait(30))) for request in requests[:3]]
    while not any(generation.new for generation in early):
        time.sleep(0.01)
    late = [engine.submit(request) for request in requests[3:]]
    others_came.set()
    assert [generation.wait(30).new for generation in (*early, *late)] == alone


def test_adapters_that_there_was_no_memory_to_meet_change_nothing_for_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [Request([3, 4, 5], name, NEW) for name in ("one", "sixteen")]
    wanted = tokens(engine, requests)
    pool, lora, meet = engine._adapters._pool.resident, engine._adapters.lora, MultiLora._meet

    def fail(multi: MultiLora, weights: Any) -> None:
        meet(multi, weights)
        raise torch.OutOfMemoryError("no memory")

    one, sixteen = [*pool][-2:]
    with torch.inference_mode():
        lora.select([sixteen], pool)
        with monkeypatch.context() as failing, pytest.raises(torch.OutOfMemoryError):
            failing.setattr(MultiLora, "_meet", fail)
            lora.select([one], pool)
        lora.select([], pool)
    assert tokens(engine, requests) == wanted


@in_slots
def test_slots_that_would_take_more_memory_than_adapters_may_are_not_made(
    engine: Engine, folders: dict[str, Path], plans: list[Plan | Turns | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = engine._adapters.lora
    slots: Any = lora._products
    tokens(engine, [Request([3, 4, 5], "sixteen", 2)])
    wide = lora.bytes
    names = ["one", "sixteen", ""]
    mixed_and_alone(engine, folders, names)
    assert any(isinstance(plan, Plan) for plan in plans)
    monkeypatch.setattr(slots, "_memory", wide // len(slots._slots))
    del plans[:]
    mixed_and_alone(engine, folders, names)
    assert any(isinstance(plan, Turns) for plan in plans)
    assert not any(isinstance(plan, Plan) and plan.blocks * plan.rank > 16 for plan in plans)
    mixed_and_alone(engine, folders, ["one", "one", ""])
    assert lora.bytes <= slots._memory, "there is no room for the highest rank that ever was"


@in_slots
def test_memory_that_was_not_there_for_slots_is_asked_for_again(
    engine: Engine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots: Any = engine._adapters.lora._products
    resize, failed = Layer.resize, []

    def fail_in_the_middle(layer: Layer, count: int, rank: int) -> None:
        if len(failed) < 3 and count:
            failed.append(layer)
            if len(failed) == 3:
                raise torch.OutOfMemoryError("no memory")
        resize(layer, count, rank)

    slots._slots, slots._room = [], 0
    monkeypatch.setattr(Layer, "resize", fail_in_the_middle)
    mixed_and_alone(engine, folders, ["one", "two", "one", ""])
    assert len(failed) == 3


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("phi3", ["qkv_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"]), ("gemma2", ["k_proj", "gate_proj", "o_proj"])],
)
def test_architectures(tmp_path: Path, architecture: str, targets: list[str], count: int) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture)
    adapters = {
        n: tiny_adapter(base, tmp_path / n, seed=len(n), target_modules=targets, rank=len(n)) for n in ("ab", "c")
    }
    engine = Engine(base, adapters, max_batch=8)
    asked = prompts(count)  # each row is a block, or they are gathered
    names = ["", *adapters]
    try:
        given = tokens(engine, [Request(prompt, names[i % 3], NEW) for i, prompt in enumerate(asked)])
    finally:
        engine.close()
    models = [reference(base, adapters.get(name)) for name in names]
    assert given == [generate(models[i % 3], prompt) for i, prompt in enumerate(asked)]


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("qwen2", ["q_proj", "v_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"]), ("gemma2", "all-linear")],
)
def test_dora_is_peft_beside_any_others(tmp_path: Path, architecture: str, targets: Any) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture)
    adapters = {
        name: tiny_adapter(base, tmp_path / name, seed=i, target_modules=targets, use_dora=i < 2)
        for i, name in enumerate(("dora", "other dora", "plain"))
    }
    many = {f"{name} {i}": folder for i in range(4) for name, folder in adapters.items()}
    engine = Engine(base, many, max_batch=16, prefix_cache=False)
    names = ["", *many]
    asked = prompts(13)
    try:
        given = tokens(engine, [Request(prompt, name, NEW) for prompt, name in zip(asked, names, strict=True)])
    finally:
        engine.close()
    for name in ("", *adapters):
        model = reference(base, adapters.get(name))
        rows = [row for row, other in enumerate(names) if other[:-2] == name]
        assert [given[row] for row in rows] == [generate(model, asked[row]) for row in rows], name
    assert len({tuple(tokens_) for tokens_ in given}) == len(given)


def test_dora_over_a_quantized_base_is_refused(engine: Engine, folders: dict[str, Path], tmp_path: Path) -> None:
    dora = tiny_adapter(folders[""], tmp_path / "dora", use_dora=True)
    engine.load_adapter("dora", dora)
    engine.unload_adapter("dora")
    adapters = engine._adapters
    packed = replace(adapters._base, config={**adapters._base.config, "quantization_config": {}})
    with pytest.raises(SuiteError, match="DoRA adapter cannot be served on a quantized base"):
        Adapters(engine.model, packed, 1 << 30, lambda: None).check(dora)


def test_an_adapter_of_rubbish_is_refused_and_harms_nobody(folders: dict[str, Path], tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.mkdir()
    (rubbish / "adapter_config.json").write_bytes((folders["three"] / "adapter_config.json").read_bytes())
    weights = load_file(folders["three"] / "adapter_model.safetensors")
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = float("nan")
    save_file(weights, rubbish / "adapter_model.safetensors")
    engine = Engine(folders[""], {"rubbish": rubbish, "one": folders["one"]}, max_batch=8, prefix_cache=False)
    names = ["", "one", "rubbish"]
    try:
        requests = [Request(prompt, names[i % 3], NEW) for i, prompt in enumerate(prompts(9))]
        alone = tokens(engine, [request for request in requests if request.adapter != "rubbish"])
        together = engine.generate(requests)
    finally:
        engine.close()
    assert [g.new for g in together if g.request.adapter != "rubbish"] == alone
    refused = [g for g in together if g.request.adapter == "rubbish"]
    assert all(g.finish == "error" and "not finite" in g.error for g in refused)


def test_rows_are_arranged_in_blocks_of_one_size() -> None:
    assert arrange(["a"] * 4, 7) == (4, [("a", [0, 1, 2, 3])])
    size, blocks = arrange([*"a" * 60, "b", "c", "d"], 7)
    assert size < 60, "three rows would cost as much as 180"
    assert arrange([*"a" * 5, *"b" * 4], 1000)[0] == 1, "no row is worth computing in vain"
    for rows in (["b", "a", "", "a", *"b" * 9], [*"abcdefghi" * 3], [*"a" * 33, "", "b", "b"]):
        size, blocks = arrange(rows, 7)
        assert all(0 < len(block.rows) <= size for block in blocks)
        for key in {*rows} - {""}:
            assert [row for block in blocks if block.adapter == key for row in block.rows] == [
                row for row, other in enumerate(rows) if other == key
            ]
