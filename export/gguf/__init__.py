"""A model folder as one GGUF file, which llama.cpp and Ollama read; a few rows in memory at a time.

Architectures: llama, mistral, mixtral, qwen2, qwen2-moe, qwen3, qwen3-moe, gemma2, gemma3 (text), phi3. Weights become
float32, float16, bfloat16 or q8_0; vectors, and the routers of experts, stay float32. Another architecture or tokenizer
is an error: a file that a reader accepts and misunderstands is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from export.folder import read_config
from export.gguf.model import Model, add_keys
from export.gguf.tensors import Array, Entry, entries
from export.gguf.tokenizer import add_tokenizer, check_tokenizer, telling_name
from suite.errors import SuiteError

Weights = Literal["f32", "f16", "bf16", "q8_0"]
Progress = Callable[[float, float, str], None]

FILE_TYPES: dict[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
}
"""The tensor type of matrices, and the number that names it in `general.file_type`."""
Q8_BLOCK = 32
ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
ALIGNMENT = 32
"""Bytes; each tensor starts at a multiple of it."""


def check(folder: Path) -> None:
    """Raise SuiteError for a model whose architecture, settings or tokenizer llama.cpp does not know."""
    Model.read(folder)
    check_tokenizer(folder)


def write(folder: Path, out: Path, weights: Weights, name: str, progress: Progress = lambda *_: None) -> None:
    """Write the model in `folder` to the file `out`, called `name` inside.

    Raises SuiteError for an architecture, a tokenizer or a tensor that the format, or this module, does not know, and
    for values that float16 cannot hold.
    """
    import gguf

    model = Model.read(folder)
    writer = gguf.GGUFWriter(out, model.arch)
    writer.add_type("model")
    writer.add_name(telling_name(name, folder))
    writer.add_file_type(FILE_TYPES[weights][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_keys(writer, model)
    add_tokenizer(writer, folder, model.config)
    write_tensors(writer, out, list(entries(model)), weights, progress)


def write_tensors(writer: Any, out: Path, tensors: list[Entry], weights: Weights, progress: Progress) -> None:
    """Write the header of a GGUFWriter to `out`, then the bytes of `tensors`, block by block."""
    import gguf

    from export.lora.arithmetic import one_thread

    for entry in tensors:
        kind = _kind(entry, weights)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(entry.shape)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), count // block * size, raw_dtype=kind)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    total, done = sum(math.prod(e.shape) for e in tensors), 0
    with one_thread(), out.open("ab") as file:
        for entry in tensors:
            _align(file)
            for values in entry.blocks():
                file.write(_encode(values, _kind(entry, weights), entry.name).data)
                done += values.size
                progress(done, total, "gguf")
        _align(file)


def verify(folder: Path, file: Path) -> dict[str, float]:
    """Read `file` back and compare its tensors with those of the model in `folder`.

    Returns the largest |difference|, and the largest relative to the largest value of its tensor. Raises SuiteError
    when a tensor is missing.
    """
    return compare(entries(Model.read(folder)), file)


def compare(tensors: Iterable[Entry], file: Path) -> dict[str, float]:
    """Like `verify`, for any tensors."""
    import gguf

    found = {t.name: t for t in gguf.GGUFReader(file).tensors}
    worst, relative = 0.0, 0.0
    for entry in tensors:
        if entry.name not in found:
            raise SuiteError(f"'{entry.name}' did not arrive", where=str(file))
        stored = found[entry.name]
        data = stored.data.reshape(-1, stored.data.shape[-1] if len(entry.shape) > 1 else 1)
        first, difference, largest = 0, 0.0, 1e-30
        for expected in entry.blocks():
            rows = data[first : first + len(expected)]
            got = gguf.quants.dequantize(rows, stored.tensor_type).reshape(expected.shape)
            difference = max(difference, float(np.abs(got - expected).max()))
            largest = max(largest, float(np.abs(expected).max()))
            first += len(expected)
        worst, relative = max(worst, difference), max(relative, difference / largest)
    return {"max_abs": worst, "max_relative": relative}


def lossless(folder: Path) -> Weights:
    """The type that holds the weights of the model in `folder` as they are: what to quantize from."""
    config = read_config(folder)
    known: dict[str, Weights] = {"float16": "f16", "bfloat16": "bf16"}
    return known.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")


def _kind(entry: Entry, weights: Weights) -> Any:
    import gguf

    kind = FILE_TYPES[weights][0]
    if len(entry.shape) == 1 or entry.name.endswith(ALWAYS_F32):
        kind = "F32"
    elif weights == "q8_0" and entry.shape[-1] % Q8_BLOCK:
        kind = "F16"
    return gguf.GGMLQuantizationType[kind]


def _encode(values: Array, kind: Any, name: str) -> Array:
    import gguf

    values = np.ascontiguousarray(values)
    encoded: Array = _half(values, name) if kind.name == "F16" else gguf.quants.quantize(values, kind)
    return np.ascontiguousarray(encoded)


def _half(values: Array, name: str) -> Array:
    """As float16, by PyTorch: NumPy takes 25 times as long to convert them, and gives the same bits."""
    import torch

    given = torch.from_numpy(values)
    if max(map(abs, map(float, torch.aminmax(given)))) > torch.finfo(torch.float16).max:
        raise SuiteError(f"'{name}' has values that float16 cannot hold", hint='weights = "bf16"')
    half: Array = given.half().numpy()
    return half


def _align(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))
