"""The tensors of a model as llama.cpp wants them: its names, its layout, a few rows at a time.

Experts lie on disk one by one, or gate and up fused; llama.cpp has them stacked, gate and up apart. So every tensor is
a list of row ranges of tensors on disk, which are read in order: memory does not grow with a tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.folder import is_tied
from export.gguf.model import Model
from export.tensors import ITEM, Tensor, read_checkpoint
from suite.errors import SuiteError

Array = npt.NDArray[Any]
Change = Callable[[Array], Array]

NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
BLOCK = 1 << 18
"""Elements read at once, in whole rows."""
EXPERT = re.compile(r"(?P<layer>.+\.)(?:mlp|block_sparse_moe)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight$")
FUSED = re.compile(r"(?P<layer>.+\.)mlp\.experts\.(?P<part>gate_up_proj|down_proj)$")
LANGUAGE = re.compile(r"^(model\.)?language_model\.")
SEEING = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
"""How the parts of a model that takes images are called: of transformers 5, and of 4."""
PARTS = {
    **dict.fromkeys(("gate_proj", "w1"), "gate_proj"),
    **dict.fromkeys(("up_proj", "w3"), "up_proj"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}
"""The names of an expert's matrices, Mixtral's too."""


@dataclass(frozen=True)
class Rows:
    """Rows `first` to `first + count` of a tensor on disk, a row being what lies along the last axis."""

    tensor: Tensor
    first: int
    count: int

    def blocks(self, multiple: int = 1) -> Iterator[Array]:
        """Consecutive rows (n, columns) as float32, n a multiple of `multiple`."""
        tensor = self.tensor
        if tensor.dtype not in NUMPY:
            raise SuiteError(f"'{tensor.name}' is {tensor.dtype}, not a float", where=str(tensor.file))
        columns = _columns(tensor.shape)
        step = max(BLOCK // (columns * multiple), 1) * multiple
        for first in range(self.first, self.first + self.count, step):
            rows = min(step, self.first + self.count - first)
            start = tensor.start + first * columns * ITEM[tensor.dtype]
            raw = np.fromfile(tensor.file, NUMPY[tensor.dtype], rows * columns, offset=start)
            if tensor.dtype == "BF16":
                raw = raw.astype(np.uint32)
                raw <<= 16
                raw = raw.view(np.float32)
            yield raw.astype(np.float32, copy=False).reshape(rows, columns)


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file; `blocks()` gives its values in order, as float32 of whole rows (n, columns)."""

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Array]]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], rows: list[Rows], change: Change | None, multiple: int) -> Entry:
        """A tensor made of `rows`, changed block by block; `change` sees a multiple of `multiple` rows."""

        def blocks() -> Iterator[Array]:
            for part in rows:
                for block in part.blocks(multiple):
                    yield change(block) if change else block

        return cls(name, shape, blocks)


def entries(model: Model) -> Iterator[Entry]:
    """Every tensor of the file, in the order of the checkpoint; raises SuiteError for one that has no place in it."""
    name_of = names(model)
    yield from _rope_factors(model)
    checkpoint = _language_model(model)
    tied = is_tied(model.config, set(checkpoint))
    if not tied and model.arch == "gemma2":
        raise SuiteError("llama.cpp's gemma2 has no head apart from the embedding", where=str(model.folder))
    seen = set()
    for key, (shape, rows) in _stacked(model, checkpoint).items():
        if key.endswith("rotary_emb.inv_freq") or (tied and key == "lm_head.weight"):
            continue
        new = name_of(key)
        if new is None:
            where = str(rows[0].tensor.file)
            raise SuiteError(f"'{key}' has no place in a GGUF of {model.arch}", where=where)
        seen.add(new)
        change, multiple = _change(model, key)
        yield Entry.of(new, shape, rows, change, multiple)
        if tied and new == "token_embd.weight" and model.arch == "qwen2moe":  # its head is not optional
            yield Entry.of("output.weight", shape, rows, None, 1)
    for needed in ("token_embd.weight", "output_norm.weight"):
        if needed not in seen:
            raise SuiteError(f"no tensor of the checkpoint becomes '{needed}'", where=str(model.folder))


def _language_model(model: Model) -> dict[str, Tensor]:
    """The checkpoint; of a model that sees its language model, by the names that it has where it stands alone."""
    checkpoint = read_checkpoint(model.folder)
    if not model.sees:
        return checkpoint
    return {LANGUAGE.sub(r"\1", name): tensor for name, tensor in checkpoint.items() if not SEEING.match(name)}


def names(model: Model) -> Callable[[str], str | None]:
    """The name that llama.cpp has for a tensor of the checkpoint; None for one that it does not know."""
    import gguf

    enum = next(key for key, arch in gguf.MODEL_ARCH_NAMES.items() if arch == model.arch)
    table = gguf.get_tensor_name_map(enum, model.config["num_hidden_layers"])

    def name_of(key: str) -> str | None:
        found: str | None = table.get_name(key, try_suffixes=(".weight", ".bias"))
        return found

    return name_of


def interleave(values: Array, heads: int) -> Array:
    """Reorder each head's rows (heads * D, ...) from halves to neighbours.

    Hugging Face rotates row i of a head with row i + D/2, llama.cpp's "llama" row 2i with row 2i + 1.
    """
    rest = values.shape[1:]
    return values.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(values.shape)


def _columns(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) > 1 else 1


def _change(model: Model, key: str) -> tuple[Change | None, int]:
    """How the values change where llama.cpp computes with another layout, and how many rows belong together."""
    module = key.rsplit(".", 1)[0]
    if model.arch == "llama" and module.endswith(("q_proj", "k_proj")):
        return lambda block: interleave(block, len(block) // model.head_dim), model.head_dim
    if model.arch.startswith("gemma") and module.endswith("norm"):
        return lambda block: block + np.float32(1), 1  # there the norm multiplies by 1 + weight
    return None, 1


def _stacked(model: Model, checkpoint: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], list[Rows]]]:
    """Shape and rows of every tensor, the experts of a layer stacked (experts, rows, columns)."""
    found: dict[str, tuple[tuple[int, ...], list[Rows]]] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in checkpoint.items():
        if match := EXPERT.match(key):
            if match["part"] not in PARTS:
                raise SuiteError(f"'{key}' is of no expert known here", where=str(tensor.file))
            stack = f"{match['layer']}mlp.experts.{PARTS[match['part']]}.weight"
            experts.setdefault(stack, {})[int(match["number"])] = tensor
            found[stack] = ((model.experts, *tensor.shape), [])
        elif match := FUSED.match(key):
            found.update(_unfused(f"{match['layer']}mlp.experts.", match["part"], tensor))
        else:
            found[key] = (tensor.shape, [Rows(tensor, 0, _rows(tensor.shape))])
    for stack, tensors in experts.items():
        shape, rows = found[stack]
        for number in range(model.experts):
            if number not in tensors or tensors[number].shape != shape[1:]:
                raise SuiteError(f"'{stack}': expert {number} is missing or of another shape", where=str(model.folder))
            rows.append(Rows(tensors[number], 0, shape[1]))
    return found


def _unfused(layer: str, part: str, tensor: Tensor) -> dict[str, tuple[tuple[int, ...], list[Rows]]]:
    """Fused experts (E, out, in) as llama.cpp has them; of gate_up_proj, gate is the first half of each expert."""
    experts, out, columns = tensor.shape
    if part == "down_proj":
        return {f"{layer}down_proj.weight": (tensor.shape, [Rows(tensor, 0, experts * out)])}
    half = out // 2
    return {
        f"{layer}{name}.weight": (
            (experts, half, columns),
            [Rows(tensor, i * out + start, half) for i in range(experts)],
        )
        for name, start in (("gate_proj", 0), ("up_proj", half))
    }


def _rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape) // _columns(shape)


def _rope_factors(model: Model) -> Iterator[Entry]:
    """Tensors that the rotary embedding needs beside its base frequency: llama 3.1's and longrope's factors."""
    theta, scaling = model.rope
    factors: dict[str, list[float]] = {}
    if model.rope_type == "llama3":
        factors["rope_freqs"] = _llama3_factors(theta, scaling, model.head_dim)
    elif model.rope_type == "longrope":
        factors = {"rope_factors_long": scaling["long_factor"], "rope_factors_short": scaling["short_factor"]}
    for name, values in factors.items():
        array = np.array(values, np.float32).reshape(-1, 1)
        yield Entry(f"{name}.weight", (len(array),), lambda array=array: iter([array]))  # type: ignore[misc]


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
