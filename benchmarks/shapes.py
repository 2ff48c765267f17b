"""Models and adapters as fast as real ones, whose answers all go on until they have as many tokens as asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.peers import Setting

NANO = Path(__file__).parents[1] / "examples/nano/model"
RANK = 8
MANY_MEMORY = 64 << 20
"""Bytes of adapters that the server with many of them may hold: a fraction of all."""


def make(name: str, folder: Path, adapters: list[str], many: int) -> Setting:
    """A model without an end, `adapters` for it, and `many` more in the folder `many`."""
    model = folder / "model"
    kind = _nano(model) if name == "nano" else _eight_million(model)
    loras = {adapter: lora(model, folder / adapter, seed) for seed, adapter in enumerate(adapters)}
    for number in range(many):
        lora(model, folder / "many" / f"m{number}", number)
    return Setting(model, kind, loras, folder)


def _nano(folder: Path) -> str:
    """The suite's own model (qwen3, 3.7 million parameters, the embedding tied to the output)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(NANO, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][_stops(folder)] = 0  # logit 0, which is never the largest
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return "qwen3"


def _eight_million(folder: Path) -> str:
    """A Llama of 7.9 million random parameters, in float32, with nano's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    for file in NANO.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=7, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[_stops(folder)] = 0
    model.save_pretrained(folder)
    shutil.copy(NANO / "generation_config.json", folder)
    return "llama"


def _stops(folder: Path) -> list[int]:
    stops: list[int] = json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    return stops


def lora(model: Path, folder: Path, seed: int) -> Path:
    """A LoRA of rank 8 on every linear layer, with small random weights: its speed does not depend on them."""
    import torch
    from safetensors.torch import save_file

    from serve.folders import read_model

    random = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, shape in read_model(model).shapes.items():
        if name.endswith("proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = 0.01 * torch.randn(RANK, shape[1], generator=random)
            pairs[f"{module}.lora_B.weight"] = 0.01 * torch.randn(shape[0], RANK, generator=random)
    folder.mkdir(parents=True)
    save_file(pairs, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": sorted({name.split(".")[-3] for name in pairs}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    return folder
