"""Merged weights against peft, for kinds of adapters and architectures; merged logits against base plus adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from export.merge import Merge, merge
from export.tensors import read_checkpoint
from suite.stages import Artifact
from tests.tiny.export_jobs import run
from tests.tiny.tiny_models import tiny_adapter, tiny_model

IDS = torch.arange(3, 60).unsqueeze(0)


def stage(base: Path, adapter: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return run(Merge(adapter="a", base="b", **settings), out, adapter=adapter, base=base)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()(IDS).logits


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"layers.1.*": 3, "q_proj": 5}},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "head saved whole": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved whole": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_base_and_adapter(tmp_path: Path, kind: str) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter", **KINDS[kind])
    if "whole" in kind:
        move_saved(adapter)
    out = tmp_path / "merged"
    merge(base, [adapter], out, 10**9)
    expected = logits(base, adapter)
    assert (expected - logits(base)).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(logits(out), expected, rtol=1e-4, atol=2e-4)


def move_saved(adapter: Path) -> None:
    """Change the tensors that were trained whole: as written, they still equal the base's."""
    from safetensors.torch import save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".lora_" not in name:
            tensors[name] = tensor + 0.1 * torch.randn_like(tensor)
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_every_architecture_merges_as_in_peft(tmp_path: Path, architecture: str) -> None:
    base = tiny_model(tmp_path / "base", architecture=architecture, hidden=64, dtype="bfloat16")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    out = tmp_path / "merged"
    merge(base, [adapter], out, 10**9)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = weights(out), weights(tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        # the product is summed in another order: at most one step of bfloat16 apart
        torch.testing.assert_close(tensor, theirs[name], rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_stage_keeps_dtype_and_files_and_records_parity(tmp_path: Path, dtype: str) -> None:
    base = tiny_model(tmp_path / "base", hidden=64, dtype=dtype)
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("about the base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text() + "{# tuned #}")
    metrics = stage(base, adapter, tmp_path / "out", max_shard_size="100KB")
    out = tmp_path / "out"
    assert {t.dtype for t in read_checkpoint(out).values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert (out / "LICENSE").is_file()
    assert not (out / "README.md").exists()
    assert (out / "chat_template.jinja").read_text().endswith("{# tuned #}")
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert metrics["changed"] == 14
    parity = metrics["parity"]
    assert parity["prompts"] == 1  # the merged model reads as the adapter was trained
    assert parity["max_dlogit"] < {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.3}[dtype]
    assert parity["kl"] < {"float32": 1e-9, "float16": 1e-4, "bfloat16": 5e-3}[dtype]
    assert parity["top1"] > 0.9
    assert parity["greedy"] > 0.5
    assert parity["ppl_parent"] == pytest.approx(parity["ppl_child"], rel=0.02)


def test_the_same_merge_gives_the_same_bytes_whatever_the_shards_of_the_base(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for source, out in ((base, "one"), (base, "two"), (sharded, "three")):
        merge(source, [adapter], tmp_path / out, 10**9)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    first, other = weights(one), weights(three)
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_untying_is_written_into_the_config(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    merge(base, [adapter], tmp_path / "out", 10**9)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(
        weights(tmp_path / "out")["model.embed_tokens.weight"], weights(base)["model.embed_tokens.weight"]
    )


def test_an_adapter_without_effect_is_a_warning(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    silent = {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}
    save_file(silent, adapter / "adapter_model.safetensors")
    events: list[dict[str, Any]] = []
    run(Merge(adapter="a", base="b"), tmp_path / "out", events, adapter=adapter, base=base)
    assert [e["text"] for e in events if e["event"] == "warn"] == [
        "the adapter changes nothing: all its B matrices are zero"
    ]


def test_the_base_is_only_read(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base", hidden=64)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    before = {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()}
    merge(base, [adapter], tmp_path / "out", 10**9)
    assert {file: file.read_bytes() for folder in (base, adapter) for file in folder.iterdir()} == before
    assert Artifact(tmp_path / "out", "model").record == {}
