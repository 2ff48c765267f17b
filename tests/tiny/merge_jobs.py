"""Adapters whose every part is random, and what peft itself makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def load(folder: Path, tokens: int | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model in `folder`, with its vocabulary changed to `tokens` if given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if tokens:
        model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def random_adapter(base: Path, folder: Path, tokens: int | None = None, seed: int = 1, **lora: Any) -> Path:
    """Write an adapter of which everything that would be trained is random; `lora` goes to `peft.LoraConfig`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
        model = get_peft_model(load(base, tokens), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return folder


def merged_by_peft(
    base: Path, adapter: Path, folder: Path, tokens: int | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What `merge_and_unload` gives, under the names in which transformers stores it."""
    PeftModel.from_pretrained(load(base, tokens, dtype), adapter).merge_and_unload().save_pretrained(folder)
    return weights(folder)
