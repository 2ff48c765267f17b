"""LoRA adapters as GGUF files: what llama.cpp computes with them is what peft computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf as reading
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import gguf, parity
from export.gguf import adapter as gguf_adapter
from export.gguf import llamacpp
from suite.chat import load_tokenizer
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_adapter, tiny_model

PATTERNS = {
    "rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2},
    "alpha_pattern": {"v_proj": 3, "layers.0.mlp.up_proj": 40},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, **PATTERNS},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
needs_llama_cpp = pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama.cpp is not installed")


def made(folder: Path, architecture: str = "qwen3", tied: bool = False, **lora: Any) -> tuple[Path, Path]:
    base = tiny_model(folder / "base", architecture=architecture, hidden=64, tie_word_embeddings=tied)
    return base, tiny_adapter(base, folder / "adapter", **lora)


@needs_llama_cpp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_llama_cpp_computes_what_peft_does(tmp_path: Path, architecture: str, kind: str) -> None:
    lora = dict(KINDS[kind])
    if architecture == "phi3" and kind == "embedding":
        lora["target_modules"] = ["qkv_proj", "embed_tokens", "lm_head"]
    base, adapter = made(tmp_path, architecture, **lora)
    gguf.write(base, tmp_path / "base.gguf", "f32", "base")
    gguf_adapter.write(adapter, base, tmp_path / "adapter.gguf", "adapter")
    ids = load_tokenizer(base)("Who are you? 你是谁？ 1234")["input_ids"]
    with torch.inference_mode():
        plain, adapted = (
            model(input_ids=torch.tensor([ids])).logits[0].numpy()
            for model in (parity.load(base), parity.load(base, adapter))
        )
    assert np.abs(adapted - plain).max() > 0.5
    with llamacpp.LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as model:
        assert np.abs(model.logits(ids) - adapted).max() < 1e-4


@needs_llama_cpp
def test_an_adapter_is_proved_on_its_base(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama")
    gguf.write(base, tmp_path / "base.gguf", "f32", "base")
    gguf_adapter.write(adapter, base, tmp_path / "adapter.gguf", "adapter")
    files = tmp_path / "adapter.gguf", tmp_path / "base.gguf"
    proved = gguf_adapter.verify(adapter, base, *files, "f32")
    assert proved["weights"] == {"max_abs": 0.0, "max_relative": 0.0}
    assert proved["parity"]["kl"] < 1e-6


def test_what_a_file_of_an_adapter_holds(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, "llama", lora_alpha=6)
    for name in ("a", "b"):
        gguf_adapter.write(adapter, base, tmp_path / f"{name}.gguf", "mine")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = reading.GGUFReader(tmp_path / "a.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert keys == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "mine",
        "general.quantization_version": 2,
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    tensors = {t.name: t.data for t in reader.tensors}
    assert len(tensors) == 2 * 7 * 2  # A and B of seven matrices in two layers
    peft = load_file(adapter / "adapter_model.safetensors")
    up = peft["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    assert np.array_equal(tensors["blk.0.ffn_up.weight.lora_b"], up.numpy())


@pytest.mark.parametrize(
    ("tied", "lora", "said"),
    [
        (False, {"use_dora": True}, "cannot hold DoRA"),
        (False, {"modules_to_save": ["lm_head"]}, r"cannot hold 'lm_head\.weight', which was trained whole"),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}, "LoRA of an embedding that is the head too"),
        (True, {"target_modules": ["q_proj", "lm_head"]}, "LoRA of an embedding that is the head too"),
        (False, {"target_modules": ["q_proj"], "lora_bias": True}, "not LoRA's"),
    ],
)
def test_what_has_no_place_in_one_is_merged_instead(
    tmp_path: Path, tied: bool, lora: dict[str, Any], said: str
) -> None:
    base, adapter = made(tmp_path, "qwen2", tied, **lora)
    if "modules_to_save" in lora:
        file = adapter / "adapter_model.safetensors"
        save_file({k: v + 1 if "lm_head" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(SuiteError, match=said) as caught:
        gguf_adapter.check(adapter, base)
    assert "merge" in caught.value.hint


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    _, adapter = made(tmp_path)
    other = tiny_model(tmp_path / "other", hidden=128)
    with pytest.raises(SuiteError, match="for another base"):
        gguf_adapter.check(adapter, other)
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}), "utf-8")
    with pytest.raises(SuiteError, match="IA3"):
        gguf_adapter.check(adapter, other)
