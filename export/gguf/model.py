"""What llama.cpp wants to know of a model beside its tensors: architecture, sizes, rotary embedding, experts.

llama.cpp has each architecture's formulas built in, with few settings. A model that needs another formula would load
and answer wrongly, so whatever of a configuration the format cannot say is an error here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.folder import read_config
from suite.errors import SuiteError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
SWA_PATTERN = {"gemma2": 2, "gemma3": 6}
"""Every so many layers llama.cpp lets one see the whole context; the others see a window."""
UNSAID_BY_GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
"""What transformers' Gemma3TextConfig takes where a configuration of a model that sees leaves it out, as they do."""
HIDDEN_PER_HEAD = {"gemma2": 46, "gemma3": 62}
"""Layers of the 27B models, by which llama.cpp knows that their queries are scaled by hidden size / heads."""
INSTEAD = 'to = "hf" writes it for transformers and vLLM'
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


@dataclass(frozen=True)
class Model:
    """What of a configuration the format wants to know."""

    folder: Path
    config: dict[str, Any]
    arch: str
    sees: bool = False
    """Whether it is the language model of one that takes images too; the rest has no place in the file."""

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises SuiteError for an architecture, or a setting of one, that llama.cpp does not compute."""
        config = read_config(folder)
        name = (config.get("architectures") or ["none"])[0]
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise SuiteError(f"no GGUF is written for {name}", where=str(folder), hint=f"{INSTEAD}; known: {known}")
        sees = "text_config" in config
        text = {**UNSAID_BY_GEMMA3, **config["text_config"]} if sees else config
        model = cls(folder, text, ARCHITECTURES[name], sees)
        for wrong in _unsaid(model):
            where = str(folder / "config.json")
            raise SuiteError(f"llama.cpp's {model.arch} cannot compute {wrong}", where=where, hint=INSTEAD)
        return model

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.config["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def experts(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return int(self.config.get("num_local_experts") or self.config.get("num_experts") or 0)

    @property
    def context(self) -> int:
        """Tokens up to which llama.cpp computes what the model does: where it has no sliding window, the window."""
        length = int(self.config["max_position_embeddings"])
        window = self.config.get("sliding_window")
        windowed = self.arch not in SWA_PATTERN and self.config.get("use_sliding_window", True)
        return min(length, int(window)) if window and windowed else length

    @property
    def rope(self) -> tuple[float, dict[str, Any]]:
        """Theta and the scaling of the rotary embedding, from transformers 5's keys or those of 4."""
        parameters = self.config.get("rope_parameters") or {}
        full = parameters.get("full_attention", parameters)
        scaling = {**(self.config.get("rope_scaling") or {}), **full}
        theta = scaling.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        return float(theta), scaling

    @property
    def rope_type(self) -> str:
        """The kind of scaling; 'default' for none."""
        _, scaling = self.rope
        return str(scaling.get("rope_type", scaling.get("type")) or "default")


def add_keys(writer: Any, model: Model) -> None:
    """Add to a GGUFWriter what llama.cpp reads before the tensors."""
    import gguf

    config, arch = model.config, model.arch
    theta, scaling = model.rope
    writer.add_context_length(model.context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(config["vocab_size"])
    if arch != "phi3":
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if arch in ("llama", "phi3"):
        partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
        writer.add_rope_dimension_count(int(model.head_dim * partial))
    if model.rope_type in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(model.rope_type))
        writer.add_rope_scaling_factor(scaling["factor"])
        if model.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if arch == "phi3":
        _add_phi3(writer, model)
    if arch.startswith("gemma"):
        _add_gemma(writer, model)
    if model.experts:
        _add_experts(writer, model)


def _add_experts(writer: Any, model: Model) -> None:
    writer.add_expert_count(model.experts)
    writer.add_expert_used_count(model.config["num_experts_per_tok"])
    sizes: dict[str, Callable[[int], None]] = {
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
        "shared_expert_intermediate_size": writer.add_expert_shared_feed_forward_length,
    }
    for key, add in sizes.items():
        if model.config.get(key):
            add(model.config[key])


def _add_phi3(writer: Any, model: Model) -> None:
    context, original = model.config["max_position_embeddings"], _original_context(model)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_sliding_window(model.config.get("sliding_window") or 0)
    if model.rope_type == "longrope":
        scale = context / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)


def _add_gemma(writer: Any, model: Model) -> None:
    config = model.config
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if model.arch == "gemma3":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        writer.add_rope_freq_base_swa(local.get("rope_theta", config.get("rope_local_base_freq", 10000.0)))


def _original_context(model: Model) -> int:
    key = "original_max_position_embeddings"
    _, scaling = model.rope
    return int(scaling.get(key) or model.config.get(key) or model.config["max_position_embeddings"])


def _unsaid(model: Model) -> list[str]:
    """What this configuration asks for and llama.cpp's formulas for the architecture do not have."""
    config, arch = model.config, model.arch
    _, scaling = model.rope
    wrong = []
    gemma = arch.startswith("gemma")
    activation = config.get("hidden_activation" if gemma else "hidden_act")
    fixed = "gelu_pytorch_tanh" if gemma else "silu"
    if activation not in (fixed, None):
        wrong.append(f"the activation '{activation}', only '{fixed}'")
    if model.rope_type not in ("default", "linear", "yarn", "llama3", "longrope"):
        wrong.append(f"rope scaling '{model.rope_type}'")
    if model.rope_type == "yarn":
        known = {"rope_type", "type", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
        other = {k for k, v in scaling.items() if k not in known and v not in (None, YARN_DEFAULTS.get(k))}
        wrong += [f"yarn with {key} = {scaling[key]}" for key in sorted(other)]
    if gemma:
        wrong += _unsaid_of_gemma(model)
    if model.experts:
        wrong += _unsaid_of_experts(model)
    return wrong


def _unsaid_of_gemma(model: Model) -> list[str]:
    config, every = model.config, SWA_PATTERN[model.arch]
    layers = config["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    wrong = []
    if config.get("layer_types", kinds) != kinds:
        wrong.append(f"these layer_types, only full attention at every layer no. {every}")
    widest = layers == HIDDEN_PER_HEAD[model.arch]
    scaled_by = config["hidden_size"] // model.heads if widest else model.head_dim
    if config.get("query_pre_attn_scalar", scaled_by) != scaled_by:
        wrong.append(f"query_pre_attn_scalar = {config['query_pre_attn_scalar']}, only {scaled_by}")
    return wrong


def _unsaid_of_experts(model: Model) -> list[str]:
    config = model.config
    wrong = []
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        wrong.append("layers without experts (mlp_only_layers, decoder_sparse_step)")
    normalized = {"qwen2moe": False, "qwen3moe": True}.get(model.arch)
    if normalized is not None and bool(config.get("norm_topk_prob")) != normalized:
        wrong.append(f"norm_topk_prob = {str(not normalized).lower()}")
    return wrong
