"""What of a configuration llama.cpp cannot compute is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from export.gguf import llamacpp
from export.gguf.model import Model
from export.gguf.tokenizer import GPT2, pre_tokenizer
from suite.errors import SuiteError

BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
}
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"}
SLIDING = [*["sliding_attention"] * 5, "full_attention"]
EXPERTS = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2_SPLIT = {"type": "Split", "pattern": {"Regex": GPT2}, "behavior": "Isolated", "invert": False}


def read(folder: Path, **config: Any) -> Model:
    (folder / "config.json").write_text(json.dumps({**BASE, **config}))
    return Model.read(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "no GGUF is written for GPT2LMHeadModel"),
        ({"hidden_act": "gelu"}, "the activation 'gelu', only 'silu'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {**YARN, "attention_factor": 2.0}}, r"yarn with attention_factor = 2\.0"),
        ({**GEMMA, "layer_types": SLIDING[::-1]}, "these layer_types, only full attention at every layer no. 6"),
        ({**GEMMA, "query_pre_attn_scalar": 256}, "query_pre_attn_scalar = 256, only 16"),
        ({**EXPERTS, "norm_topk_prob": False}, "norm_topk_prob = false"),
        ({**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [0]}, "layers without experts"),
        (
            {**EXPERTS, "architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": True},
            "qwen2moe cannot compute norm_topk_prob = true",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(SuiteError, match=said):
        read(tmp_path, **config)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_parameters": {**YARN, "beta_fast": 32, "beta_slow": 1.0, "attention_factor": None}},
        {**GEMMA, "layer_types": SLIDING, "query_pre_attn_scalar": 16},
        {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1},
    ],
)
def test_what_it_can(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, **config).head_dim == 16


def test_the_context_ends_with_a_window_that_llama_cpp_does_not_have(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(tmp_path, **mistral, sliding_window=512).context == 512
    assert read(tmp_path, **mistral, sliding_window=None).context == 2048
    assert read(tmp_path, sliding_window=512, use_sliding_window=False).context == 2048
    assert read(tmp_path, **GEMMA, sliding_window=512).context == 2048


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{**BYTE_LEVEL, "use_regex": True}], "gpt-2"),
        ([GPT2_SPLIT, BYTE_LEVEL], "gpt-2"),
        ([{**GPT2_SPLIT, "behavior": "Removed", "invert": True}, BYTE_LEVEL], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}], "smollm"),
        ([{**GPT2_SPLIT, "behavior": "Removed"}, BYTE_LEVEL], None),
        ([{"type": "Digits", "individual_digits": False}, {**BYTE_LEVEL, "use_regex": True}], None),
        ([{**BYTE_LEVEL, "add_prefix_space": True, "use_regex": True}], None),
        ([BYTE_LEVEL], None),
        ([{"type": "Whitespace"}], None),
    ],
)
def test_a_pre_tokenizer_is_known_by_all_its_parts(parts: list[dict[str, Any]], name: str | None) -> None:
    for pre in [{"type": "Sequence", "pretokenizers": parts}, *(parts if len(parts) == 1 else [])]:
        if name:
            assert pre_tokenizer({"pre_tokenizer": pre}, Path("m")) == name
        else:
            with pytest.raises(SuiteError, match="no such pre-tokenizer"):
                pre_tokenizer({"pre_tokenizer": pre}, Path("m"))


def test_without_llama_cpp_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llamacpp, "installed", lambda: False)
    read(tmp_path)
    tokenizer = {"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {**BYTE_LEVEL, "use_regex": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    llamacpp.check(tmp_path, "q8_0")
    with pytest.raises(SuiteError, match=r"a GGUF of type q4_k_m needs llama\.cpp") as caught:
        llamacpp.check(tmp_path, "q4_k_m")
    assert caught.value.hint == 'pip install "suite[llamacpp]"'
    warned: list[str] = []
    assert llamacpp.verify(tmp_path, tmp_path / "m.gguf", "f16", warn=warned.append) == {}
    assert warned == [llamacpp.NOT_RUN]
