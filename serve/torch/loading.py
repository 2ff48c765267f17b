"""Loading a checkpoint for the engine: dtype, device, and how much memory its cache may take."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.folders import OTHERS, STATE, ModelFolder, check_layers
from serve.torch.attention import NAME, OWN, register
from serve.torch.fused import fuse
from serve.torch.trial import alone, check
from suite import quantized
from suite.errors import SuiteError, near

PLAIN = "eager"
"""The attention that computes what a model's authors wrote down: others leave out what they have no argument for."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_SHARE, GPU_SHARE = 0.25, 0.6
"""How much of a machine's memory, or of what is free on a GPU after loading, may hold keys and values."""


def load_model(folder: ModelFolder, dtype: str) -> Any:
    """The model, ready for inference, on the GPUs there are or else on the CPU.

    Its `parts` are those of `fuse`, its `token_bytes` what keys and values of a token take. `dtype` "auto" is the
    checkpoint's on a GPU, and float32 on a CPU: answers then do not depend on what shares the batch, and few CPUs are
    faster in bfloat16. Quantized layers compute in it too. Raises SuiteError for a model that cannot be served.
    """
    if dtype not in DTYPES:
        raise SuiteError(f"unknown dtype '{dtype}'", hint=near(dtype, DTYPES))
    asks = _asks_for_attention(folder.path)
    register()
    on_gpu = torch.cuda.is_available()
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    # with a map transformers wants accelerate, which takes a while to import
    on_cpu = "cpu" if quantized.settings(folder.path) else None
    model = quantized.load(
        folder.path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=NAME if asks else None,
        device_map="auto" if on_gpu else on_cpu,
    )
    packed = getattr(model.config, "quantization_config", None) is not None
    if packed:
        # GPTQModel's kernels in torch would be compiled anew, for seconds, with every shape of a batch
        torch.compiler.set_stance("force_eager")
    model.eval()
    if asks:
        model.config._attn_implementation = PLAIN
    wanted = alone(model)
    model.config._attn_implementation = NAME if asks else OWN
    model.parts = fuse(model)
    model.token_bytes = check(model, wanted, rough=packed or model.dtype.itemsize < 4)
    return model


def _asks_for_attention(folder: Path) -> bool:
    """Whether the model's layers ask transformers for the function that computes their attention.

    Raises SuiteError for what has no keys and values, or more than those.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, ValueError) as error:  # no such architecture, or one that generates nothing
        raise SuiteError(
            f"transformers has no causal language model of this kind: {error}", where=str(folder)
        ) from None
    text = config.get_text_config(decoder=True)
    for key in ("layer_types", "attention_layers"):
        check_layers(getattr(text, key, None) or (), folder)
    if kind._is_stateful:
        raise SuiteError(f"{kind.__name__} {STATE}", where=str(folder), hint=OTHERS)
    if "past_key_values" not in inspect.signature(kind.forward).parameters:
        raise SuiteError(
            f"{kind.__name__} keeps no keys and values, and cannot be served", where=str(folder), hint=OTHERS
        )
    return bool(kind._can_set_attn_implementation())


def cache_cells(model: Any, memory: int | None = None) -> int:
    """How many tokens the cache may hold in `memory` bytes, by default the shares above."""
    if memory is None:
        memory = memory_share(model, CPU_SHARE, GPU_SHARE)
    return max(1024, memory // int(model.token_bytes))


def memory_share(model: Any, cpu: float, gpu: float) -> int:
    """Bytes: a share of the machine's memory, or of what is free on the model's GPU."""
    if model.device.type == "cuda":
        return int(gpu * torch.cuda.mem_get_info(model.device)[0])
    return int(cpu * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
