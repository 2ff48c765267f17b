"""Loading a checkpoint for the engine: dtype, device, and how much memory its cache may take."""

from __future__ import annotations

import os
from typing import Any

import torch

from serve.folders import ModelFolder
from serve.torch.attention import register
from serve.torch.fused import fuse
from suite import quantized
from suite.errors import SuiteError, near

DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_SHARE, GPU_SHARE = 0.25, 0.6
"""How much of a machine's memory, or of what is free on a GPU after loading, may hold keys and values."""


def load_model(folder: ModelFolder, dtype: str) -> Any:
    """The model, ready for inference, on the GPUs there are or else on the CPU; its `parts` are those of `fuse`.

    `dtype` "auto" is the checkpoint's on a GPU, and float32 on a CPU: answers then do not depend on what shares the
    batch, and few CPUs are faster in bfloat16. Quantized layers compute in it too.
    """
    if dtype not in DTYPES:
        raise SuiteError(f"unknown dtype '{dtype}'", hint=near(dtype, DTYPES))
    on_gpu = torch.cuda.is_available()
    if dtype == "auto" and not on_gpu:
        dtype = "float32"
    # with a map transformers wants accelerate, which takes a while to import
    on_cpu = "cpu" if quantized.settings(folder.path) else None
    model = quantized.load(
        folder.path,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        attn_implementation=register(),
        device_map="auto" if on_gpu else on_cpu,
    )
    if getattr(model.config, "quantization_config", None) is not None:
        # GPTQModel's kernels in torch would be compiled anew, for seconds, with every shape of a batch
        torch.compiler.set_stance("force_eager")
    model.eval()
    model.parts = fuse(model)
    return model


def cache_cells(model: Any, memory: int | None = None) -> int:
    """How many tokens the cache may hold in `memory` bytes, by default the shares above."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token: int = 2 * config.num_hidden_layers * heads * dim * model.dtype.itemsize
    if memory is None:
        memory = memory_share(model, CPU_SHARE, GPU_SHARE)
    return max(1024, memory // per_token)


def memory_share(model: Any, cpu: float, gpu: float) -> int:
    """Bytes: a share of the machine's memory, or of what is free on the model's GPU."""
    if model.device.type == "cuda":
        return int(gpu * torch.cuda.mem_get_info(model.device)[0])
    return int(cpu * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
