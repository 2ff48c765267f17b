"""GGUF files: read back with gguf's own reader, for every architecture and type."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.gguf import verify, write
from export.gguf.model import UNSAID_BY_GEMMA3
from export.gguf.tensors import interleave
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_model, tiny_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
}


def value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_arrives_in_every_architecture(tmp_path: Path, architecture: str) -> None:
    folder = tiny_model(tmp_path / "m", architecture=architecture, hidden=64, **SETTINGS.get(architecture, {}))
    file = tmp_path / "m.gguf"
    write(folder, file, "f32", "tiny")
    assert verify(folder, file) == {"max_abs": 0.0, "max_relative": 0.0}
    reader, arch = gguf.GGUFReader(file), ARCHITECTURES[architecture]
    names = {t.name for t in reader.tensors}
    assert {"token_embd.weight", "output_norm.weight", "blk.1.attn_output.weight"} <= names
    assert ("output.weight" in names) == (architecture == "qwen2_moe")  # tied, but its head is not optional
    assert value(reader, "general.architecture") == arch
    assert value(reader, f"{arch}.block_count") == 2
    assert value(reader, f"{arch}.attention.head_count_kv") == 2
    parameters = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    head = 512 * 64 if architecture == "qwen2_moe" else 0
    assert sum(int(t.n_elements) for t in reader.tensors) == parameters + head


@pytest.mark.parametrize(
    ("weights", "number", "bound"), [("f16", 1, 2**-11), ("bf16", 32, 2**-8), ("q8_0", 7, 1 / 127)]
)
def test_types_are_as_exact_as_they_can_be(tmp_path: Path, weights: Any, number: int, bound: float) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    file = tmp_path / "m.gguf"
    write(folder, file, weights, "tiny")
    assert 0 < verify(folder, file)["max_relative"] <= bound
    reader = gguf.GGUFReader(file)
    assert value(reader, "general.file_type") == number
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == weights.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_bfloat16_weights_become_float16_values(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64, dtype="bfloat16", tie_word_embeddings=False)
    file = tmp_path / "m.gguf"
    write(folder, file, "bf16", "tiny")
    assert verify(folder, file)["max_abs"] == 0
    assert "output.weight" in {t.name for t in gguf.GGUFReader(file).tensors}


def test_llama_rows_are_where_llama_cpp_rotates_them() -> None:
    """Rotating halves as transformers does, then reordering, is reordering, then rotating neighbours as llama.cpp."""
    heads, dim = 2, 8
    x = np.random.default_rng(0).normal(size=(heads * dim, 3)).astype(np.float32)
    angle = np.linspace(0.1, 0.9, dim // 2, dtype=np.float32)[:, None]

    def halves(v: np.ndarray) -> np.ndarray:
        first, second = v.reshape(heads, 2, dim // 2, 3).swapaxes(0, 1)
        turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        return np.stack(turned, 1).reshape(v.shape)

    def neighbours(v: np.ndarray) -> np.ndarray:
        pairs = v.reshape(heads, dim // 2, 2, 3)
        even, odd = pairs[:, :, 0], pairs[:, :, 1]
        turned = [even * np.cos(angle) - odd * np.sin(angle), odd * np.cos(angle) + even * np.sin(angle)]
        return np.stack(turned, 2).reshape(v.shape)

    np.testing.assert_allclose(interleave(halves(x), heads), neighbours(interleave(x, heads)), rtol=1e-6)


def test_the_tokenizer_is_written_whole(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    file = tmp_path / "m.gguf"
    write(folder, file, "f16", "tiny")
    reader, tokenizer = gguf.GGUFReader(file), tiny_tokenizer()
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == 512
    types = value(reader, "tokenizer.ggml.token_type")
    assert [types[tokenizer.convert_tokens_to_ids(t)] for t in ("<|im_end|>", "a")] == [3, 1]
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == tokenizer.eos_token_id
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    for name in ("a", "b"):
        write(folder, tmp_path / f"{name}.gguf", "q8_0", "tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    folder = tiny_model(tmp_path / "m", architecture="llama", hidden=128, rope_parameters=rope)
    file = tmp_path / "m.gguf"
    write(folder, file, "f16", "tiny")
    written = next(t.data for t in gguf.GGUFReader(file).tensors if t.name == "rope_freqs.weight")
    from transformers import AutoConfig

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(written, (plain / slowed).numpy(), rtol=1e-5)


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    tensors = load_file(folder / "model.safetensors")
    file = folder / "model.safetensors"
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, file)
    with pytest.raises(SuiteError, match="float16 cannot hold"):
        write(folder, tmp_path / "m.gguf", "f16", "tiny")
    write(folder, tmp_path / "m.gguf", "bf16", "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(SuiteError, match="the model has 100 tokens"):
        write(folder, tmp_path / "m.gguf", "bf16", "tiny")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "model.extra.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(SuiteError, match=r"'model\.extra\.weight' has no place"):
        write(folder, tmp_path / "m.gguf", "bf16", "tiny")


def test_fused_experts_become_the_same_file(tmp_path: Path) -> None:
    """Some checkpoints hold gate and up of all experts as one tensor, as transformers has them in memory."""
    folder = tiny_model(tmp_path / "m", architecture="qwen3_moe", hidden=64, **SETTINGS["qwen3_moe"])
    write(folder, tmp_path / "apart.gguf", "q8_0", "tiny")
    apart = load_file(folder / "model.safetensors")
    fused = {name: values for name, values in apart.items() if ".experts." not in name}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([apart[f"{stem}.{i}.{part}_proj.weight"] for i in range(4)]) for part in ("gate", "up", "down")
        )
        fused[f"{stem}.gate_up_proj"] = torch.cat([gate, up], 1)
        fused[f"{stem}.down_proj"] = down.contiguous()
    save_file(fused, folder / "model.safetensors")
    write(folder, tmp_path / "fused.gguf", "q8_0", "tiny")

    def tensors(name: str) -> dict[str, bytes]:
        return {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / name).tensors}

    assert tensors("fused.gguf") == tensors("apart.gguf")


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", architecture="qwen3_moe", hidden=64, **SETTINGS["qwen3_moe"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SuiteError, match=r"layers\.1\.mlp\.experts\.up_proj.*: expert 2 is missing"):
        write(folder, tmp_path / "m.gguf", "f16", "tiny")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_takes_images_its_language_model_is_written(tmp_path: Path, prefix: str) -> None:
    """By the names of transformers 4 and 5; a configuration leaves out what is usual."""
    folder = tiny_model(tmp_path / "m", architecture="gemma3_text", hidden=64, **SETTINGS["gemma3_text"])
    write(folder, tmp_path / "alone.gguf", "f16", "tiny")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    text = {key: value for key, value in config.items() if UNSAID_BY_GEMMA3.get(key) != value}
    seeing = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (folder / "config.json").write_text(json.dumps(seeing))
    renamed = {name.replace("model.", prefix, 1): values for name, values in tensors.items()}
    more = {"vision_tower.a.weight": torch.zeros(2, 2), "model.multi_modal_projector.b": torch.zeros(2, 2)}
    save_file({**renamed, **more}, folder / "model.safetensors")
    write(folder, tmp_path / "seeing.gguf", "f16", "tiny")
    alone, seeing_too = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("alone", "seeing"))
    assert alone == seeing_too


def test_what_a_configuration_of_gemma3_leaves_out_is_what_transformers_takes() -> None:
    from transformers import Gemma3TextConfig

    usual = Gemma3TextConfig().to_dict()
    usual["rope_theta"] = usual["rope_parameters"]["full_attention"]["rope_theta"]
    assert usual | UNSAID_BY_GEMMA3 == usual


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", hidden=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(1 << 16, 64)
    save_file(tensors, folder / "model.safetensors")
    write(folder, tmp_path / "warm.gguf", "q8_0", "tiny")
    tracemalloc.start()
    write(folder, tmp_path / "m.gguf", "q8_0", "tiny")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < tensors["model.embed_tokens.weight"].nbytes / 2
