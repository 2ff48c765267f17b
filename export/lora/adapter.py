"""A PEFT LoRA adapter as files: what it changes, by the names of weights in memory; reads headers only, no torch."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from export.folder import read_json
from export.tensors import Tensor, read_header
from suite.errors import SuiteError

HEAD = "lm_head.weight"
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of LoraConfig that change what a merge has to compute; truthy ones are refused."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that subtract the start of the adapter from the base, which is then no longer the base on disk."""
KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?P<kind>\.weight|\.bias)?$"
)
TOKENS = ".token_adapter.trainable_tokens_delta"
WRAPPERS = re.compile(r"\.(modules_to_save|base_layer|token_adapter)(?=\.)")
"""Parts that peft adds to the name of a weight."""
FUSED = ("gate_up_proj", "down_proj")
"""The parameters of a mixture's experts in memory, in the order of their definition: peft wraps them in this order."""


@dataclass(frozen=True)
class Lora:
    """A low-rank change of one weight: `scale * B @ A`, transposed for embeddings and Conv1D.

    `a` is (rank, in ...), `b` (out, rank ...); of the experts that share them, `expert` says which one of how many, and
    `rows` which outputs of it; where the weight is `stacked`, it holds all of them, one after another.
    """

    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    transposed: bool = False
    magnitude: Tensor | None = None
    expert: tuple[int, int] = (0, 1)
    rows: tuple[int, int] | None = None
    stacked: bool = False

    @property
    def scale(self) -> float:
        """The factor of `B @ A`: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        r = self.a.shape[0] // self.expert[1]
        return self.alpha / (math.sqrt(r) if self.rslora else r)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change, of one expert; the dimensions of a convolution's kernel count as inputs."""
        out = self.rows[1] - self.rows[0] if self.rows else self.b.shape[0]
        return out, prod(self.a.shape[1:])


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that were trained: row `indices[i]` becomes row i of `values`."""

    indices: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class Patch:
    """What an adapter does to one weight: put `whole` in its place, then add to it or replace some rows.

    `bias` is a vector and its factor: what LoRA adds to the bias of its layer (`lora_bias`).
    """

    whole: Tensor | None = None
    lora: Lora | None = None
    bias: tuple[Tensor, float] | None = None
    tokens: Tokens | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration, and its patches by the name of the weight in memory."""

    folder: Path
    config: dict[str, Any]
    patches: dict[str, Patch] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises SuiteError for a folder that is no LoRA adapter, or one of a kind that cannot be merged exactly."""
        if not (folder / "adapter_config.json").is_file():
            raise SuiteError("the adapter has no adapter_config.json", where=str(folder))
        config = read_json(folder / "adapter_config.json")
        _refuse(config, str(folder / "adapter_config.json"))
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        patches: dict[str, dict[str, Any]] = defaultdict(dict)
        for key, tensor in read_weights(folder).items():
            name = key.removeprefix("base_model.model.")
            if ".original_module." in name:  # what modules_to_save replaces; peft saves it of a resized embedding
                continue
            if match := KEY.match(name):
                parts[match["module"]][match["part"] + (".bias" if match["kind"] == ".bias" else "")] = tensor
            elif name.endswith(TOKENS):
                module = WRAPPERS.sub("", name.removesuffix(TOKENS))
                patches[f"{module}.weight"]["tokens"] = Tokens(_indices(config, module, tensor), tensor)
            elif ".lora_" in name:
                raise SuiteError(f"'{key}' is of no kind of LoRA known here", where=str(tensor.file))
            else:
                patches[WRAPPERS.sub("", name)]["whole"] = tensor
        for module, weight in _parameters(config, parts).items():
            patches[weight]["lora"] = _lora(config, weight, parts[module])
            if bias := parts[module].get("B.bias"):
                patches[weight.removesuffix("weight") + "bias"]["bias"] = bias, patches[weight]["lora"].scale
        return cls(folder, config, {name: Patch(**found) for name, found in patches.items()})

    @property
    def tied(self) -> bool:
        """Whether what it does to the embedding of a tied model it does to the head too (`ensure_weight_tying`)."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def loras(self) -> dict[str, Lora]:
        """The low-rank changes by weight."""
        return {name: patch.lora for name, patch in self.patches.items() if patch.lora}

    @property
    def whole(self) -> dict[str, Tensor]:
        """The tensors that were trained whole."""
        return {name: patch.whole for name, patch in self.patches.items() if patch.whole}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's folder; raises SuiteError for pickled ones."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise SuiteError(
            "the adapter's weights are pickled",
            where=str(folder / "adapter_model.bin"),
            hint="load it with peft and save it again: save_pretrained writes safetensors",
        )
    return read_header(file)


def _refuse(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SuiteError(f"a {kind} adapter cannot be merged here, only LoRA", where=where)
    wrong = next((f"{key} = {json.dumps(config[key])}" for key in UNSUPPORTED if config.get(key)), "")
    hint = "train it without, or serve it unmerged"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        wrong = f"init_lora_weights = {json.dumps(start)}"
        hint = "save it with path_initial_model_for_weight_conversion: peft then writes it against the base on disk"
    if wrong:
        raise SuiteError(f"an adapter with {wrong} cannot be merged tensor by tensor", where=where, hint=hint)


def _indices(config: Mapping[str, Any], module: str, values: Tensor) -> tuple[int, ...]:
    trained = config.get("trainable_token_indices") or []
    if isinstance(trained, dict):
        trained = next((found for name, found in trained.items() if f".{module}".endswith(f".{name}")), [])
    if len(trained) != values.shape[0]:
        raise SuiteError(
            f"{values.shape[0]} tokens of '{module}' were trained, and trainable_token_indices has {len(trained)}",
            where=str(values.file),
        )
    return tuple(trained)


def _parameters(config: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, str]:
    """The weight that each module of LoRA parts belongs to.

    Where peft adapts parameters of a module that is no layer (`target_parameters`), it wraps the module once for each,
    and a key tells by how deep its wrapper is only, not by name, which of them it changes.
    """
    wanted = config.get("target_parameters") or ()
    nested: dict[str, list[str]] = defaultdict(list)
    for module in parts:
        nested[WRAPPERS.sub("", f"{module}.").removesuffix(".")].append(module)
    found: dict[str, str] = {}
    for module, keys in nested.items():
        names = dict.fromkeys(t.rpartition(".")[2] for t in wanted)
        adapted = [n for n in names if any(_adapts(t, module, n) for t in wanted)]
        adapted.sort(key=lambda n: FUSED.index(n) if n in FUSED else -1)
        adapted = adapted or ["weight"]
        keys.sort(key=len, reverse=True)  # the first parameter is wrapped first, so its name is the longest
        if len(keys) != len(adapted) or (len(adapted) > 1 and not set(adapted) <= set(FUSED)):
            raise SuiteError(f"which parameters of '{module}' its {len(keys)} LoRA pairs change is not known here")
        found |= {key: f"{module}.{name}" for key, name in zip(keys, adapted, strict=True)}
    return found


def _adapts(target: str, module: str, name: str) -> bool:
    """Whether one of `target_parameters` means the parameter `name` of `module`.

    A bare name such as "down_proj" is that of a parameter, which experts have; elsewhere it is the name of a layer.
    """
    return f".{module}.{name}".endswith(f".{target}") and (
        "." in target or name not in FUSED or module.endswith("experts")
    )


def _lora(config: Mapping[str, Any], weight: str, parts: Mapping[str, Tensor]) -> Lora:
    embedding = "embedding_A" in parts
    try:
        a, b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
    except KeyError:
        file = next(iter(parts.values())).file
        raise SuiteError(f"'{weight}' has only one half of its LoRA pair", where=str(file)) from None
    if b.shape[1:2] != a.shape[:1]:
        raise SuiteError(f"the halves of the LoRA pair of '{weight}' are of different ranks", where=str(a.file))
    alpha: float = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", weight.removesuffix(".weight")):  # the first that matches, as in peft
            alpha = value
            break
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    return Lora(a, b, alpha, bool(config.get("use_rslora")), transposed, parts.get("magnitude_vector"))
