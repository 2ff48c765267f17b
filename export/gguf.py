"""A model folder as one GGUF file, which llama.cpp and Ollama read; one tensor in memory at a time.

Architectures: llama, mistral, qwen2, qwen3, gemma2, gemma3 (text), phi3. Weights become float32, float16, bfloat16 or
q8_0; vectors stay float32. Another architecture or tokenizer is an error: a file that a reader accepts and
misunderstands is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from export.folder import is_tied, read_config
from export.gguf_tokenizer import add_tokenizer
from export.tensors import Tensor, read_checkpoint
from suite.errors import SuiteError

Array = npt.NDArray[Any]
Weights = Literal["f32", "f16", "bf16", "q8_0"]
Progress = Callable[[float, float, str], None]

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
}
FILE_TYPES: dict[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
}
"""The tensor type of matrices, and the number that names it in `general.file_type`."""
Q8_BLOCK = 32
NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class Model:
    """What of a configuration the format wants to know."""

    folder: Path
    config: dict[str, Any]
    arch: str

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises SuiteError for an architecture that is not known here."""
        config = read_config(folder)
        name = (config.get("architectures") or ["none"])[0]
        if name not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise SuiteError(f"no GGUF is written for {name}", where=str(folder), hint=f"known: {known}")
        return cls(folder, config, ARCHITECTURES[name])

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


def write(folder: Path, out: Path, weights: Weights, name: str, progress: Progress = lambda *_: None) -> None:
    """Write the model in `folder` to the file `out`, called `name` inside.

    Raises SuiteError for an architecture, a tokenizer or a tensor that the format, or this module, does not know, and
    for values that float16 cannot hold.
    """
    import gguf

    model = Model.read(folder)
    writer = gguf.GGUFWriter(out, model.arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[weights][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model)
    add_tokenizer(writer, folder, model.config)
    tensors = list(_tensors(model))
    for new, shape, _ in tensors:
        kind = gguf.GGMLQuantizationType[_kind(shape, weights)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(new, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, (new, shape, values) in enumerate(tensors):
        writer.write_tensor_data(_encode(values(), _kind(shape, weights), new))
        progress(i + 1, len(tensors), "gguf")
    writer.close()


def verify(folder: Path, file: Path) -> dict[str, float]:
    """Read `file` back and compare its tensors with those of the model in `folder`.

    Returns the largest |difference|, and the largest relative to the largest value of its tensor. Raises SuiteError
    when a tensor is missing.
    """
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(file).tensors}
    worst, relative = 0.0, 0.0
    for new, shape, values in _tensors(Model.read(folder)):
        if new not in found:
            raise SuiteError(f"'{new}' did not arrive", where=str(file))
        expected = values()
        got = gguf.quants.dequantize(found[new].data, found[new].tensor_type).reshape(shape)
        difference = float(np.abs(got - expected).max())
        worst = max(worst, difference)
        relative = max(relative, difference / max(float(np.abs(expected).max()), 1e-30))
    return {"max_abs": worst, "max_relative": relative}


def _kind(shape: tuple[int, ...], weights: Weights) -> str:
    if len(shape) == 1:
        return "F32"
    if weights == "q8_0" and shape[-1] % Q8_BLOCK:
        return "F16"
    return FILE_TYPES[weights][0]


def _encode(values: Array, kind: str, name: str) -> Array:
    import gguf

    if kind == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise SuiteError(f"'{name}' has values that float16 cannot hold", hint='weights = "bf16"')
    encoded: Array = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType[kind])
    return encoded


def _tensors(model: Model) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    """Name, shape and values (float32, when called) of every tensor, as llama.cpp wants them."""
    import gguf

    enum = next(key for key, arch in gguf.MODEL_ARCH_NAMES.items() if arch == model.arch)
    names = gguf.get_tensor_name_map(enum, model.config["num_hidden_layers"])
    yield from _rope_factors(model)
    checkpoint = read_checkpoint(model.folder)
    tied = is_tied(model.config, set(checkpoint))
    for key, tensor in checkpoint.items():
        if key.endswith("rotary_emb.inv_freq") or (tied and key == "lm_head.weight"):
            continue
        new = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise SuiteError(f"'{key}' has no place in a GGUF of {model.arch}", where=str(tensor.file))
        yield new, tensor.shape, lambda tensor=tensor: _values(model, tensor)  # type: ignore[misc]


def _values(model: Model, tensor: Tensor) -> Array:
    """The tensor as float32, changed where llama.cpp computes with another layout."""
    if tensor.dtype not in NUMPY:
        raise SuiteError(f"'{tensor.name}' is {tensor.dtype}, not a float", where=str(tensor.file))
    raw = np.fromfile(tensor.file, NUMPY[tensor.dtype], math.prod(tensor.shape), offset=tensor.start)
    values = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw.astype(np.float32)
    values = values.reshape(tensor.shape)
    module = tensor.name.rsplit(".", 1)[0]
    if model.arch == "llama" and module.endswith("q_proj"):
        return interleave(values, model.heads)
    if model.arch == "llama" and module.endswith("k_proj"):
        return interleave(values, model.kv_heads)
    if model.arch.startswith("gemma") and module.endswith("norm"):
        return values + np.float32(1)  # there the norm multiplies by 1 + weight
    return values


def interleave(values: Array, heads: int) -> Array:
    """Reorder each head's rows (heads * D, ...) from halves to neighbours.

    Hugging Face rotates row i of a head with row i + D/2, llama.cpp's "llama" row 2i with row 2i + 1.
    """
    rest = values.shape[1:]
    return values.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(values.shape)


def _add_shape(writer: Any, model: Model) -> None:
    import gguf

    config, arch = model.config, model.arch
    theta, scaling = model.rope
    writer.add_context_length(config["max_position_embeddings"])
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
    elif model.rope_type not in ("default", "llama3", "longrope"):
        raise SuiteError(f"rope scaling '{model.rope_type}' has no place in a GGUF", where=str(model.folder))
    if arch == "phi3":
        _add_phi3(writer, model)
    if arch.startswith("gemma"):
        _add_gemma(writer, model)


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


def _rope_factors(model: Model) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    """Tensors that the rotary embedding needs beside its base frequency: llama 3.1's and longrope's factors."""
    theta, scaling = model.rope
    factors: dict[str, list[float]] = {}
    if model.rope_type == "llama3":
        factors["rope_freqs"] = _llama3_factors(theta, scaling, model.head_dim)
    elif model.rope_type == "longrope":
        factors = {"rope_factors_long": scaling["long_factor"], "rope_factors_short": scaling["short_factor"]}
    for name, values in factors.items():
        array = np.array(values, np.float32)
        yield f"{name}.weight", array.shape, lambda array=array: array  # type: ignore[misc]


def _llama3_factors(theta: float, scaling: Mapping[str, Any], head_dim: int) -> list[float]:
    """By how much each frequency is slowed (transformers, `_compute_llama3_parameters`): long waves most."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    context = scaling["original_max_position_embeddings"]
    found = []
    for i in range(0, head_dim, 2):
        turns = context / (2 * math.pi * theta ** (i / head_dim))  # of this frequency within the original context
        if turns > high:
            found.append(1.0)
        elif turns < low:
            found.append(float(factor))
        else:
            smooth = (turns - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found
