"""Every kind of adapter and architecture, against peft's own merge: bit for bit, or what rounds otherwise and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from export.lora.fit import Combination
from export.merge import Merge, merge
from tests.tiny.export_jobs import run
from tests.tiny.merge_jobs import load, merged_by_peft, random_adapter, weights
from tests.tiny.tiny_models import tiny_model

EXPERTS: dict[str, dict[str, int]] = {
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2}
UNTIED = {"tie_word_embeddings": False}


def compare(
    base: Path, adapter: Path, work: Path, tokens: int | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """The names of the tensors that differ from peft's, after checking that nothing else does."""
    merge(base, [adapter], work / "ours", 10**9)
    ours = weights(work / "ours")
    theirs = merged_by_peft(base, adapter, work / "theirs", tokens, dtype)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    before = weights(base)
    moved = [n for n, t in theirs.items() if n not in before or t.shape != before[n].shape or not t.equal(before[n])]
    assert moved  # the adapter does something
    return {n: (ours[n], theirs[n]) for n in ours if not ours[n].equal(theirs[n])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2"]
)
def test_every_architecture_merges_bit_for_bit_as_in_peft(tmp_path: Path, architecture: str, dtype: str) -> None:
    config = GPT2 if architecture == "gpt2" else {}
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, dtype=dtype, **config)
    adapter = random_adapter(base, tmp_path / "adapter")
    assert not compare(base, adapter, tmp_path, dtype=getattr(torch, dtype))


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an alpha that is no multiple of the rank": ({"r": 3, "lora_alpha": 7}, {}),
    "rank one": ({"r": 1}, {}),
    "rank-stabilized": ({"use_rslora": True, "r": 8, "lora_alpha": 5}, {}),
    "patterns": ({"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"layers.1.*": 3, "q_proj": 5}}, {}),
    "dora": ({"use_dora": True}, {}),
    "embedding and head": ({"target_modules": ["embed_tokens", "lm_head"]}, UNTIED),
    "head saved whole": ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, UNTIED),
    "all biases": ({"bias": "all"}, {}),
    "biases of the layers": ({"bias": "lora_only"}, {}),
    "a bias of its own": ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, {}),
    "some tokens": ({"trainable_token_indices": [3, 4, 200]}, {}),
    "some tokens of both": (
        {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}, "target_modules": ["q_proj"]},
        UNTIED,
    ),
    "a parameter": ({"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_bit_for_bit_as_in_peft(tmp_path: Path, kind: str) -> None:
    lora, config = KINDS[kind]
    base = tiny_model(tmp_path / "base", architecture="qwen2", hidden=64, **config)
    assert not compare(base, random_adapter(base, tmp_path / "adapter", **lora), tmp_path)


@pytest.mark.parametrize(
    ("lora", "tied"),
    [
        ({}, True),
        ({}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"trainable_token_indices": [513, 520]}, True),
    ],
)
def test_new_tokens_come_with_the_adapter(tmp_path: Path, lora: dict[str, Any], tied: bool) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, tie_word_embeddings=tied)
    adapter = random_adapter(base, tmp_path / "adapter", tokens=530, target_modules=["q_proj"], **lora)
    (adapter / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    assert not compare(base, adapter, tmp_path, tokens=530)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (530, tied)
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == '{"of": "the adapter"}'
    assert load(tmp_path / "ours").get_input_embeddings().weight.shape == (530, 64)


CROSSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"o_proj": 2, "down_proj": 7}, "alpha_pattern": {"layers.1.*": 3, "o_proj": 5}},
    "whole": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", CROSSED)
@pytest.mark.parametrize("architecture", ["phi3", "gemma2", "qwen3_moe"])
def test_kinds_and_architectures_in_bfloat16_are_one_rounding_from_the_sum(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    """peft rounds DoRA to bfloat16 several times on the way; in float32, rounded once, it gives the reference."""
    config = UNTIED | EXPERTS.get(architecture, {})
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, dtype="bfloat16", **config)
    lora = CROSSED[kind]
    if architecture == "qwen3_moe" and kind == "dora":  # peft has no DoRA of experts that it joined
        lora = {**lora, "target_modules": ["q_proj", "o_proj"]}
    adapter = random_adapter(base, tmp_path / "adapter", **lora)
    merge(base, [adapter], tmp_path / "ours", 10**9)
    before, ours = weights(base), weights(tmp_path / "ours")
    theirs = merged_by_peft(base, adapter, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert any(not tensor.equal(before[name]) for name, tensor in ours.items())
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), theirs[name], rtol=2**-8, atol=1e-6, msg=name)


EMBEDDING: dict[str, dict[str, Any]] = {
    "low rank": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 4]}},
}


@pytest.mark.parametrize("kind", EMBEDDING)
def test_an_adapter_that_ties_embedding_and_head_keeps_them_tied(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = random_adapter(base, tmp_path / "adapter", ensure_weight_tying=True, **EMBEDDING[kind])
    merge(base, [adapter], tmp_path / "ours", 10**9)
    assert "lm_head.weight" not in weights(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["tie_word_embeddings"] is True
    merged, together = load(tmp_path / "ours"), PeftModel.from_pretrained(load(base), adapter)
    assert not merged.get_input_embeddings().weight.equal(load(base).get_input_embeddings().weight)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, together(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_experts_that_are_one_tensor_on_disk_too(tmp_path: Path, size: int) -> None:
    """Where inputs and outputs are as many, only the kind of model tells which of them come first."""
    config = {"intermediate_size": size, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = tiny_model(tmp_path / "base", architecture="gpt_oss", hidden=64, **config, **UNTIED)
    lora = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = random_adapter(base, tmp_path / "adapter", **lora, rank_pattern={"down_proj": 2})
    assert not compare(base, adapter, tmp_path)
    metrics = run(Merge(adapter="a", base="b"), tmp_path / "proved", adapter=adapter, base=base)
    assert metrics["parity"]["kl"] < 1e-9 < metrics["parity"]["effect"]
    how = Combination((0.5, 0.5))  # of the same one twice is that one
    merge(base, [adapter, adapter], tmp_path / "halves", 10**9, how=how)
    for name, tensor in weights(tmp_path / "halves").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "ours")[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", EXPERTS)
@pytest.mark.parametrize("parts", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_experts_are_one_parameter_in_memory_and_many_tensors_on_disk(
    tmp_path: Path, architecture: str, parts: list[str]
) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, **EXPERTS[architecture])
    wanted = [f"mlp.experts.{part}" for part in parts]
    lora = {"target_modules": ["q_proj"], "target_parameters": wanted, "rank_pattern": {"down_proj": 2}}
    assert not compare(base, random_adapter(base, tmp_path / "adapter", **lora), tmp_path)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_all_linear_layers_of_a_mixture_are_its_router_and_experts_too(tmp_path: Path, architecture: str) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, **EXPERTS[architecture])
    different = compare(base, random_adapter(base, tmp_path / "adapter"), tmp_path)
    assert all(len(ours) == 1 for ours, _ in different.values())  # a weight of one row is summed in another order
    for ours, theirs in different.values():
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_adapter_of_each_expert_as_transformers_4_had_them(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", architecture="qwen3_moe", hidden=64, **EXPERTS["qwen3_moe"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.manual_seed(0)
    pairs = {}
    for name, weight in weights(base).items():
        if ".experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = 0.1 * torch.randn(4, weight.shape[1])
            pairs[f"{module}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], 4)
    save_file(pairs, adapter / "adapter_model.safetensors")
    modules = ["gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": modules}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    for ours, theirs in compare(base, adapter, tmp_path).values():  # peft sums gate and up with zeros between them
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_experts_in_bfloat16_are_rounded_once_where_peft_rounds_twice(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", architecture="mixtral", hidden=64, dtype="bfloat16", **EXPERTS["mixtral"])
    adapter = random_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=["experts.down_proj"])
    differing = compare(base, adapter, tmp_path, dtype=torch.bfloat16)
    assert differing
    for ours, theirs in differing.values():
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize(
    ("architecture", "config", "lora"),
    [("gpt2", GPT2, {}), ("llama", UNTIED, {"target_modules": ["embed_tokens"]})],
)
def test_dora_of_a_transposed_weight_measures_its_columns(
    tmp_path: Path, architecture: str, config: dict[str, Any], lora: dict[str, Any]
) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, **config)
    adapter = random_adapter(base, tmp_path / "adapter", use_dora=True, **lora)
    for ours, theirs in compare(base, adapter, tmp_path).values():  # a norm over the rows, summed block by block
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


class Convolutions(torch.nn.Module):
    """One of each kind that LoRA adapts; the last has a kernel of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.line = torch.nn.Conv1d(6, 10, 3)
        self.plane = torch.nn.Conv2d(6, 10, (3, 2))
        self.point = torch.nn.Conv2d(6, 6, 1)


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_merge_as_in_peft(tmp_path: Path, dora: bool) -> None:
    torch.manual_seed(0)
    plain = Convolutions()
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file(plain.state_dict(), base / "model.safetensors")
    names = ["line", "plane", "point"]
    adapted = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=names, use_dora=dora))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], tmp_path / "ours", 10**9)
    theirs = adapted.merge_and_unload().state_dict()
    for name, tensor in weights(tmp_path / "ours").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_converted_adapter_merges_and_an_unconverted_one_is_refused(tmp_path: Path, start: str) -> None:
    from suite.errors import SuiteError

    base = tiny_model(tmp_path / "base", hidden=64)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(load(base), LoraConfig(init_lora_weights=start, **settings))
    model.peft_config["default"].init_lora_weights = True  # as peft's documentation has it: the start is saved as it is
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(SuiteError, match=start) as caught:
        merge(base, [tmp_path / "raw"], tmp_path / "refused", 10**9)
    assert "path_initial_model_for_weight_conversion" in caught.value.hint
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert not compare(base, tmp_path / "adapter", tmp_path)
    trained = model.merge_and_unload().state_dict()  # the base that training changed, plus what it learnt
    merged = load(tmp_path / "ours").state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_in_half_precision_merge_as_in_peft(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, dtype="bfloat16")
    adapter = random_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in weights(adapter).items()}, file)
    assert not compare(base, adapter, tmp_path, dtype=torch.bfloat16)
