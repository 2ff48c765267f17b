"""A PEFT LoRA adapter as a GGUF file, for `llama-server --lora` and Ollama's ADAPTER.

llama.cpp multiplies B A by adapter.lora.alpha / rank, one alpha for all; what of PEFT's scaling that cannot say
(rsLoRA, ranks and alphas by pattern) is multiplied into B. What has no place in the format is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from export.folder import is_tied
from export.gguf import Progress, compare, llamacpp, write_tensors
from export.gguf.model import Model
from export.gguf.tensors import Array, Entry, Rows, interleave, names
from export.lora.adapter import HEAD, Adapter, Lora
from export.lora.fit import ALONE, fit
from export.tensors import Tensor, read_checkpoint
from suite.errors import SuiteError

INSTEAD = "merge it into its base, and export that"


def check(adapter: Path, base: Path) -> None:
    """Raise SuiteError for an adapter that is for another base, or has what a GGUF adapter cannot hold."""
    _read(adapter, base)


def write(adapter: Path, base: Path, out: Path, name: str, progress: Progress = lambda *_: None) -> None:
    """Write the adapter in the folder `adapter`, of the model in `base`, to the file `out`, called `name` inside.

    Its tensors are float32. Raises SuiteError as `check` does.
    """
    import gguf

    model, found = _read(adapter, base)
    writer = gguf.GGUFWriter(out, model.arch)
    writer.add_type("adapter")
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", _alpha(found))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tensors(writer, out, list(_entries(model, found)), "f32", progress)


def verify(
    adapter: Path,
    base: Path,
    file: Path,
    base_file: Path,
    weights: llamacpp.Weights,
    progress: Progress = lambda *_: None,
    warn: llamacpp.Say = lambda _: None,
) -> dict[str, Any]:
    """Read `file` back, and prove by llama.cpp that with `base_file`, of type `weights`, it answers as PEFT does."""
    model, found = _read(adapter, base)
    read_back = compare(_entries(model, found), file)
    return {"weights": read_back, **llamacpp.verify(base, base_file, weights, progress, warn, (adapter, file))}


def _read(adapter: Path, base: Path) -> tuple[Model, Adapter]:
    model, found = Model.read(base), Adapter.read(adapter)
    checkpoint = read_checkpoint(base)
    tied = is_tied(model.config, set(checkpoint))
    fit(checkpoint, model.config, [found], ALONE)
    name_of = names(model)
    for name, lora in found.loras.items():
        new = name_of(name)
        if lora.magnitude is not None:
            raise _no_place(adapter, f"DoRA (of '{name}')")
        if new is None or not name.endswith(".weight") or "_exps" in new:
            raise _no_place(adapter, f"LoRA of '{name}'")
        if tied and (name == HEAD or new == "token_embd.weight"):
            raise _no_place(adapter, "LoRA of an embedding that is the head too")
    for name, tensor in found.whole.items():
        if name not in checkpoint or not _same(tensor, checkpoint[name]):  # PEFT saves some that were never trained
            raise _no_place(adapter, f"'{name}', which was trained whole")
    for name, patch in found.patches.items():
        if patch.bias or patch.tokens:
            raise _no_place(adapter, f"a change of '{name}' that is not LoRA's")
    if not found.loras:
        raise SuiteError("the adapter changes no weight", where=str(adapter))
    return model, found


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the bytes are equal; blocks of both come at the same offsets."""
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and all(a == b for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _no_place(adapter: Path, what: str) -> SuiteError:
    return SuiteError(f"a GGUF adapter cannot hold {what}", where=str(adapter), hint=INSTEAD)


def _alpha(adapter: Adapter) -> float:
    return float(adapter.config.get("lora_alpha") or 1)


def _entries(model: Model, adapter: Adapter) -> Iterator[Entry]:
    """A and B of every changed weight, by the name of the weight."""
    name_of = names(model)
    for name, lora in sorted(adapter.loras.items()):
        new = name_of(name)
        embedding = new == "token_embd.weight"
        a, b = _a(lora, embedding), _b(model, name, lora, _alpha(adapter))
        rank = lora.a.shape[0]
        yield Entry(f"{new}.lora_a", (lora.a.shape[1], rank) if embedding else lora.a.shape, a)
        yield Entry(f"{new}.lora_b", lora.b.shape, b)


def _a(lora: Lora, embedding: bool) -> Callable[[], Iterator[Array]]:
    """(r, in); of an embedding transposed (V, r), for llama.cpp looks up its rows."""

    def blocks() -> Iterator[Array]:
        values = _whole(lora.a)
        yield np.ascontiguousarray(values.T) if embedding else values

    return blocks


def _b(model: Model, name: str, lora: Lora, alpha: float) -> Callable[[], Iterator[Array]]:
    """(out, r), with the rows where llama.cpp rotates them and what its own scale lacks."""
    factor = np.float32(lora.scale / (alpha / lora.a.shape[0]))
    turned = model.arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight"))

    def blocks() -> Iterator[Array]:
        values = _whole(lora.b) * factor
        yield interleave(values, len(values) // model.head_dim) if turned else values

    return blocks


def _whole(tensor: Tensor) -> Array:
    return np.concatenate(list(Rows(tensor, 0, tensor.shape[0]).blocks()))
