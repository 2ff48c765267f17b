"""A PEFT LoRA adapter as files: what it changes in a base, and whether it fits one; reads headers only, no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from export.tensors import Tensor, read_header
from suite.errors import SuiteError

HEAD = "lm_head.weight"
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of LoraConfig that change what a merge has to compute; truthy ones are refused."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations that subtract the start of the adapter from the base, which is then no longer the base on disk."""
KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|embedding_A|embedding_B|magnitude_vector)(\.weight)?$"
)


@dataclass(frozen=True)
class Lora:
    """A low-rank change of one weight: `scale * B @ A`, transposed for embeddings and Conv1D."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Edit:
    """How a tensor of the merged model comes about: the bytes of `source`, changed by `lora`."""

    target: Tensor
    source: Tensor
    lora: Lora | None = None

    @property
    def copied(self) -> bool:
        """The bytes stay as they are."""
        return self.lora is None and self.source.dtype == self.target.dtype


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: its configuration, low-rank changes by weight name, and tensors that were trained whole."""

    folder: Path
    config: dict[str, Any]
    loras: dict[str, Lora] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Raises SuiteError for a folder that is no LoRA adapter, or one of a kind that cannot be merged exactly."""
        file = folder / "adapter_config.json"
        if not file.is_file():
            raise SuiteError("the adapter has no adapter_config.json", where=str(folder))
        config = json.loads(file.read_text("utf-8"))
        _refuse(config, str(file))
        loras: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, Tensor] = {}
        for name, tensor in read_header(folder / "adapter_model.safetensors").items():
            short = name.removeprefix("base_model.model.")
            if match := KEY.match(short):
                loras.setdefault(match["module"], {})[match["part"].removesuffix(".weight")] = tensor
            elif ".lora_" in short:
                raise SuiteError(f"'{name}' is of no kind of LoRA known here", where=str(tensor.file))
            else:
                whole[short.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
        return cls(folder, config, {f"{m}.weight": _lora(config, m, parts) for m, parts in loras.items()}, whole)

    def fit(self, base: Mapping[str, Tensor], tied: bool) -> tuple[list[Edit], bool]:
        """All tensors of the merged model, in the order of `base`, and whether its head is still tied.

        Tied means that the head is the embedding. An adapter that changes only one of them unties them: that is what
        base plus adapter computes, and a merge that kept them tied would not.

        Raises SuiteError naming the first module that is not in this base, or has another shape there.
        """
        known = dict(base)
        touched = {*self.loras, *self.whole}
        embedding = next((n for n in base if n.endswith(("embed_tokens.weight", "wte.weight"))), "")
        if tied and embedding and touched & {HEAD, embedding}:
            tied = False
            known[HEAD] = replace(base[embedding], name=HEAD)
        for name in sorted(touched):
            self._check(name, known)
        edits = []
        for name, tensor in known.items():
            edits.append(Edit(tensor, self.whole.get(name, tensor), self.loras.get(name)))
        return edits, tied

    def _check(self, name: str, base: Mapping[str, Tensor]) -> None:
        module = name.removesuffix(".weight")
        hint = "give the base that this adapter was trained on"
        if trained_on := self.config.get("base_model_name_or_path"):
            hint += f": '{Path(trained_on).name}'"
        if name not in base:
            raise SuiteError(
                f"the adapter is for another base: it changes '{module}', which this one does not have",
                where=str(self.folder),
                hint=hint,
            )
        wanted, has = self._shape(name), base[name].shape
        if wanted != has:
            raise SuiteError(
                f"the adapter is for another base: '{module}' is {_by(has)} there and {_by(wanted)} in the adapter",
                where=str(self.folder),
                hint=hint,
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.loras:
            return self.whole[name].shape
        lora = self.loras[name]
        shape = (lora.b.shape[0], lora.a.shape[1])
        return shape[::-1] if lora.transposed else shape


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _refuse(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SuiteError(f"a {kind} adapter cannot be merged here, only LoRA", where=where)
    wrong = [f"{key} = {json.dumps(config[key])}" for key in UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias = {json.dumps(config['bias'])}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        wrong.append(f"init_lora_weights = {json.dumps(start)}")
    if wrong:
        raise SuiteError(
            f"an adapter with {wrong[0]} cannot be merged tensor by tensor",
            where=where,
            hint="train it without, or serve it unmerged",
        )


def _lora(config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> Lora:
    embedding = "embedding_A" in parts
    try:
        a, b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
    except KeyError:
        file = next(iter(parts.values())).file
        raise SuiteError(f"'{module}' has only one half of its LoRA pair", where=str(file)) from None
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    magnitude = parts.get("magnitude_vector")
    if len(a.shape) != 2 or (magnitude and transposed):
        what = "DoRA on a transposed weight" if magnitude else "LoRA on a convolution"
        raise SuiteError(f"'{module}' has {what}, which cannot be merged here", where=str(a.file))
    rank = a.shape[0]
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # the first that matches, as in peft
            alpha = value
            break
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Lora(a, b, scale, transposed, magnitude)
