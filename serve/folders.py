"""What a model or adapter folder says about itself, checked before anything heavy is imported."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite import quantized
from suite.errors import SuiteError

Shape = tuple[int, ...]
Stamp = tuple[int, int, int]
"""What tells a file from another that takes its place: its number, time of change and size."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"

MAGNITUDE = ".lora_magnitude_vector"
"""How the name of a tensor of DoRA ends."""

STATE_LAYERS = {"linear_attention", "mamba", "conv", "hybrid", "hybrid_sliding"}
"""Layer types that keep a state of fixed size, alone or beside keys and values."""
KNOWN_LAYERS = STATE_LAYERS | {
    *("full_attention", "sliding_attention", "chunked_attention", "attention", "global"),
    *("moe", "mlp"),  # which keep nothing
}
"""Layer types whose memory our own engine knows, and whose masks are those of transformers."""

OTHERS = "another --backend may know this model"
LOAD_AGAIN = "load it again under the same name"
MERGE_FIRST = "merge it into its base first (suite merge), and serve the merged model"

# settings of peft.LoraConfig that change more than `x A B`, each with the value at which it does nothing
INERT: dict[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
}
PLAIN_STARTS = {True, False, "gaussian", "orthogonal", "eva"}
"""`init_lora_weights` that leave the base as it was; PiSSA, OLoRA, CorDA and LoftQ change it."""


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model folder: its config.json, and the shape of every stored tensor."""

    path: Path
    config: dict[str, Any]
    shapes: dict[str, Shape]

    @property
    def max_length(self) -> int:
        """Positions the model was made for."""
        known = self._text.get
        return int(known("max_position_embeddings") or known("n_positions") or known("max_seq_len") or 2048)

    @property
    def layer_types(self) -> list[str]:
        """The type of each layer, where config.json says it."""
        return list(self._text.get("layer_types") or self._text.get("layers_block_type") or ())

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint itself is quantized (GPTQ, AWQ, bitsandbytes, ...)."""
        return "quantization_config" in self.config

    @property
    def _text(self) -> dict[str, Any]:
        return self.config.get("text_config") or self.config


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: `x A^T B^T * scaling` is added to its output."""

    rank: int
    scaling: float
    inputs: int
    outputs: int
    dora: bool = False
    """Its output is scaled too, by a magnitude for each value over the length of its weights (arXiv:2402.09353)."""


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A PEFT LoRA folder: its modules by the name they have in the base model, e.g. `model.layers.0.mlp.up_proj`.

    Every reading of a folder is a version of its own, and equal to itself only.
    """

    path: Path
    modules: dict[str, LoraModule]
    stamp: Stamp

    @property
    def weights(self) -> Path:
        """The file of tensors."""
        return self.path / ADAPTER_WEIGHTS

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max(module.rank for module in self.modules.values())

    @property
    def parameters(self) -> int:
        """How many numbers its tensors have."""
        return sum(
            module.rank * (module.inputs + module.outputs) + 2 * module.dora * module.outputs
            for module in self.modules.values()
        )

    @property
    def dora(self) -> bool:
        """Whether a module scales its output."""
        return any(module.dora for module in self.modules.values())

    def check_unchanged(self) -> None:
        """Raise SuiteError when the file of tensors is not the one that was looked into."""
        if _stamp(self.weights) != self.stamp:
            raise SuiteError("the adapter changed on disk after it was loaded", where=str(self.path), hint=LOAD_AGAIN)


def read_model(folder: Path) -> ModelFolder:
    """Read a folder's headers; raises SuiteError for one that no engine can serve."""
    if not folder.is_dir():
        raise SuiteError("there is no such folder", where=str(folder))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise SuiteError(
            "this is an adapter, not a model",
            where=str(folder),
            hint="name its base with --model, and this folder with --lora",
        )
    config = _json(folder / "config.json", "a model folder needs config.json")
    if given := quantized.settings(folder):
        config["quantization_config"] = given
    if config.get("is_encoder_decoder"):
        raise SuiteError("encoder-decoder models cannot be served", where=str(folder), hint="decoder-only models can")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SuiteError("no *.safetensors weights here", where=str(folder), hint="convert other formats first")
    shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    return ModelFolder(folder, config, shapes)


def check_layers(types: Iterable[str], folder: Path) -> None:
    """Raise SuiteError for types of layers that our own engine does not know."""
    if strange := sorted({*types} - KNOWN_LAYERS):
        raise SuiteError(
            f"layers of type {', '.join(strange)} cannot be served",
            where=str(folder),
            hint=OTHERS,
        )


def read_adapter(folder: Path, dora: bool = False) -> AdapterFolder:
    """Read a LoRA folder's headers; raises SuiteError for kinds that cannot be served beside their base.

    `dora` allows those that scale outputs, as our engine can.
    """
    if not folder.is_dir():
        raise SuiteError("there is no such folder", where=str(folder))
    config = _json(folder / "adapter_config.json", "an adapter folder needs adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise SuiteError(f"a {config.get('peft_type')} adapter cannot be served", where=str(folder), hint=MERGE_FIRST)
    for key, inert in INERT.items():
        if key == "use_dora" and dora:
            continue
        if config.get(key, inert) not in (inert, None, [], {}):
            raise SuiteError(f"adapters with {key} cannot be served", where=str(folder), hint=MERGE_FIRST)
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise SuiteError(
            f"init_lora_weights = {start!r} changed the base",
            where=str(folder),
            hint="convert it to a plain LoRA first",
        )
    stamp = _stamp(folder / ADAPTER_WEIGHTS)
    shapes = tensor_shapes(folder / ADAPTER_WEIGHTS)
    return AdapterFolder(folder, _modules(shapes, config, folder), stamp)


def check_fits(adapter: AdapterFolder, model: ModelFolder, *, inner: bool = True) -> None:
    """Raise SuiteError unless every module of the adapter exists in the model, with the same shape.

    Of a model that sees too, as Qwen3.5, our own engine serves the language model alone, and training trains it: its
    adapters' names are those in it, which fit where `inner` ones do. Other engines would leave them out in silence.
    """
    shapes = dict(model.shapes)
    if inner:
        shapes |= {name.replace("language_model.", "", 1): shape for name, shape in model.shapes.items()}
    stems = {name.rpartition(".")[0] for name in shapes}
    if model.config.get("tie_word_embeddings"):
        stems.add("lm_head")
    for name, module in adapter.modules.items():
        weight = shapes.get(f"{name}.weight")
        given = (module.outputs, module.inputs)
        if name not in stems:
            raise SuiteError(
                f"this adapter is for another base: the model has no {name}",
                where=str(adapter.path),
                hint=f"the model is {model.path}",
            )
        # a quantized weight is packed, so its shape says nothing
        if weight and len(weight) == 2 and not model.quantized and given not in (weight, weight[::-1]):
            raise misfit(adapter, name, model, weight)


def misfit(adapter: AdapterFolder, name: str, model: ModelFolder, shape: Shape) -> SuiteError:
    """The error of an adapter whose layer has not the `shape` (out, in) of the model's."""
    module = adapter.modules[name]
    return SuiteError(
        f"this adapter is for another base: its {name} maps {module.inputs} to {module.outputs} values, "
        f"that of the model {shape[1]} to {shape[0]}",
        where=str(adapter.path),
        hint=f"the model is {model.path}",
    )


def tensor_shapes(file: Path) -> dict[str, Shape]:
    """The shapes in a safetensors file, from its header alone (8 bytes of length, then JSON)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > min(size, 100_000_000):
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        missing = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0) - size
        if missing > 0:
            raise ValueError(f"cut off: {missing} bytes are missing")
        return {name: tuple(info["shape"]) for name, info in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise SuiteError(f"not a safetensors file ({error})", where=str(file)) from None


def _modules(shapes: dict[str, Shape], config: dict[str, Any], folder: Path) -> dict[str, LoraModule]:
    modules = {}
    for name, (rank, inputs) in ((n, s) for n, s in shapes.items() if n.endswith(".lora_A.weight")):
        other = shapes.get(name.replace(".lora_A.", ".lora_B."))
        if other is None or len(other) != 2 or other[1] != rank:
            raise SuiteError(f"{name} has no lora_B of its rank", where=str(folder))
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if ".experts." in module:  # they see some tokens of the batch, in an order of their own
            raise SuiteError(f"a LoRA of an expert ({module}) cannot be served", where=str(folder), hint=MERGE_FIRST)
        dora = name.replace(".lora_A.weight", MAGNITUDE) in shapes
        if dora is not bool(config.get("use_dora")):
            raise SuiteError(f"use_dora does not describe {module}", where=str(folder))
        modules[module] = LoraModule(rank, _scaling(module, rank, config), inputs, other[0], dora)
    if len(shapes) != sum(2 + module.dora for module in modules.values()):
        rest = [n for n in shapes if not n.endswith((".lora_A.weight", ".lora_B.weight", MAGNITUDE))]
        raise SuiteError(
            f"tensors that are no LoRA of a linear layer: {', '.join(rest[:3])}", where=str(folder), hint=MERGE_FIRST
        )
    if not modules:
        raise SuiteError("this adapter has no LoRA tensors", where=str(folder))
    return modules


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv:2312.03732); a pattern may give a module its own alpha."""
    patterns = config.get("alpha_pattern") or {}
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = float(next(found, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _stamp(weights: Path) -> Stamp:
    try:
        found = weights.stat()
    except OSError:
        raise SuiteError(f"{weights.name} is missing", where=str(weights.parent)) from None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _json(file: Path, needed: str) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"{needed}, and there is none", where=str(file.parent)) from None
    except (OSError, ValueError) as error:
        raise SuiteError(f"cannot be read: {error}", where=str(file)) from None
    if not isinstance(read, dict):
        raise SuiteError("holds no JSON object", where=str(file))
    return read
