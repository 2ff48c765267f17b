"""Loading a checkpoint for the engine: dtype, device, and how much memory its cache may take."""

from __future__ import annotations

import inspect
import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve.folders import OTHERS, STATE_LAYERS, ModelFolder, check_layers
from serve.torch.attention import NAME, OWN, register
from serve.torch.fused import fuse
from serve.torch.trial import alone, check, refusing
from suite import quantized
from suite.errors import SuiteError, near

log = logging.getLogger("serve")

PLAIN = "eager"
"""The attention that computes what a model's authors wrote down: others leave out what they have no argument for."""
MAMBAS_CACHE = "cache_params"
"""What Mamba's models call the cache that they are given, all others `past_key_values`."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_SHARE, GPU_SHARE = 0.25, 0.6
"""How much of a machine's memory, or of what is free on a GPU after loading, may hold keys and values."""


def load_model(folder: ModelFolder, dtype: str) -> Any:
    """The model, ready for inference, on the GPUs there are or else on the CPU.

    Its `parts` are those of `fuse`, its `found` what `check` found, its `called` the names of layers that adapters can
    add to. `dtype` "auto" is the checkpoint's on a GPU, and float32 on a CPU: answers then do not depend on what shares
    the batch, and few CPUs are faster in bfloat16. Quantized layers compute in it too. Raises SuiteError for a model
    that cannot be served.
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
    if MAMBAS_CACHE in inspect.signature(type(model).forward).parameters:
        model.register_forward_pre_hook(_rename_cache, with_kwargs=True)
    if asks:
        model.config._attn_implementation = PLAIN
    wanted, model.called = alone(model)
    model.config._attn_implementation = NAME if asks else OWN
    with refusing(model):
        model.parts = fuse(model)
    model.found = check(model, wanted, rough=packed or model.dtype.itemsize < 4)
    return model


def _asks_for_attention(folder: Path) -> bool:
    """Whether the model's layers ask transformers for the function that computes their attention.

    Raises SuiteError for what keeps nothing of what it read, or in a way of its own.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = AutoModelForCausalLM._model_mapping[type(config)]
    except (KeyError, ValueError) as error:  # no such architecture, or one that generates nothing
        raise SuiteError(
            f"transformers has no causal language model of this kind: {error}", where=str(folder)
        ) from None
    text = config.get_text_config(decoder=True)
    types = [*(getattr(text, "layer_types", None) or ()), *(getattr(text, "attention_layers", None) or ())]
    check_layers(types, folder)
    if kind._is_stateful and STATE_LAYERS.isdisjoint(types):
        raise SuiteError(
            f"{kind.__name__} keeps a state in a way of its own, and cannot be served", where=str(folder), hint=OTHERS
        )
    if {"past_key_values", MAMBAS_CACHE}.isdisjoint(inspect.signature(kind.forward).parameters):
        raise SuiteError(f"{kind.__name__} takes no cache, and cannot be served", where=str(folder), hint=OTHERS)
    return bool(kind._can_set_attn_implementation())


def _rename_cache(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {MAMBAS_CACHE if name == "past_key_values" else name: value for name, value in kwargs.items()}


def cache_room(model: Any, memory: int | None, rows: int, length: int) -> tuple[int, int]:
    """How many rows may run at once, `rows` at most, and how many tokens the cache may hold in `memory` bytes.

    That is by default the shares above. Rows have at most `length` tokens. States take as much of a short row as of a
    long one, so the memory of all rows is set aside for them, half of the whole at most: fewer rows run otherwise.
    """
    if memory is None:
        memory = memory_share(model, CPU_SHARE, GPU_SHARE)
    _, token_bytes, row_bytes = model.found
    if row_bytes:
        # the cache has room for a power of two of rows
        most = 1 << max(0, (memory // 2 // row_bytes).bit_length() - 1)
        if most < rows:
            log.warning("%d requests run at once, not %d: more states would not fit into the cache", most, rows)
        rows = min(rows, most)
        memory -= row_bytes << (rows - 1).bit_length()
    if not token_bytes:
        return rows, rows * length
    return rows, max(1024, memory // token_bytes)


def memory_share(model: Any, cpu: float, gpu: float) -> int:
    """Bytes: a share of the machine's memory, or of what is free on the model's GPU."""
    if model.device.type == "cuda":
        return int(gpu * torch.cuda.mem_get_info(model.device)[0])
    return int(cpu * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
