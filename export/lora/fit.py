"""Adapters laid onto a base: what every tensor of the merged model is made of; from headers alone, no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from export.folder import is_tied
from export.lora.adapter import FUSED, HEAD, Adapter, Lora, Patch
from export.tensors import Tensor
from suite.errors import SuiteError

EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
ON_DISK = (
    (re.compile(r"^transformer\."), ""),
    (re.compile(r"\.mlp\.(?=experts\.|gate\.)"), ".block_sparse_moe."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(?=layers\.)"), "model.language_model."),
)
"""How names in memory, which adapters use, differ from those in a checkpoint: GPT-2's, Mixtral's, Gemma 3's, and those
of a model that sees too, as Qwen3.5, of which the language model alone was trained."""
LEAVES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What one parameter for all experts in memory is called in a checkpoint that has tensors of each expert."""
INPUTS_FIRST = ("gpt_oss",)
"""Kinds of models whose experts, in one tensor, are (in, out) each; that shows in shapes only where they differ."""
Method = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Combination:
    """How the adapters become one change: `weights`, in their order; `density` is the share of it that is kept."""

    weights: tuple[float, ...] = (1.0,)
    method: Method = "sum"
    density: float = 0.5
    seed: int = 0

    @property
    def single(self) -> bool:
        """One adapter, as it is."""
        return self.weights == (1.0,) and self.method == "sum"


ALONE = Combination()


@dataclass(frozen=True)
class Edit:
    """How a tensor of the merged model comes about: the numbers of `source`, changed by `patches`.

    There is a patch for each adapter that changes this tensor, with the adapter's position. A single adapter's whole
    tensor is the source itself. Of experts in one tensor, the source is (experts x rows, columns).
    """

    target: Tensor
    source: Tensor
    patches: tuple[tuple[int, Patch], ...] = ()

    @property
    def copied(self) -> bool:
        """The bytes stay as they are."""
        return not self.patches and self.source.dtype == self.target.dtype

    @property
    def changed(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.patches) or self.source.file != self.target.file


def fit(
    base: Mapping[str, Tensor],
    config: Mapping[str, Any],
    adapters: Sequence[Adapter],
    how: Combination,
) -> tuple[list[Edit], dict[str, Any]]:
    """All tensors of the merged model, in the order of `base`, and its configuration.

    A tied model's head is its embedding. An adapter that changes only one of them unties them: that is what base plus
    adapter computes, and a merge that kept them tied would not.

    Raises SuiteError naming the first module that is not in this base, or has another shape there.
    """
    embedding = next((n for n in base if n.endswith(EMBEDDINGS)), "")
    tied = bool(embedding) and is_tied(dict(config), set(base))
    laid = [_lay(adapter, {*base, HEAD} if tied else set(base), base, config) for adapter in adapters]
    known = dict(base)
    for adapter, patches in zip(adapters, laid, strict=True):
        if tied and adapter.tied:  # peft may save the head's copy of what it does to the embedding
            patches.pop(HEAD, None)
    if tied and any(_unties(patches, embedding) for a, patches in zip(adapters, laid, strict=True) if not a.tied):
        tied = False
        known[HEAD] = replace(base[embedding], name=HEAD)
        for adapter, patches in zip(adapters, laid, strict=True):
            if adapter.tied and embedding in patches:
                patches[HEAD] = patches[embedding]
            elif tokens := patches.get(embedding, Patch()).tokens:  # they were trained as rows of both
                patches.setdefault(HEAD, Patch(tokens=tokens))
    elif tied and (HEAD not in base or _same(base[HEAD], base[embedding])):
        known.pop(HEAD, None)
    edits = []
    for name, tensor in known.items():
        touching = [(i, patches[name]) for i, patches in enumerate(laid) if name in patches]
        edits.append(_edit(tensor, touching, adapters, how))
    return edits, _configured(config, base, edits, embedding, tied)


def _unties(patches: Mapping[str, Patch], embedding: str) -> bool:
    """Whether an adapter makes head and embedding of a tied model differ."""
    head, input_side = patches.get(HEAD, Patch()), patches.get(embedding, Patch())
    if head.lora or input_side.lora:
        return True
    if head.whole and input_side.whole:
        return not _same(head.whole, input_side.whole)
    return bool(head.whole or input_side.whole)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether the bytes are equal; blocks of both come at the same offsets."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    same_place = (one.file, one.start) == (other.file, other.start)
    return same_place or all(a == b for a, b in zip(one.blocks(), other.blocks(), strict=True))


def _edit(tensor: Tensor, touching: Sequence[tuple[int, Patch]], adapters: Sequence[Adapter], how: Combination) -> Edit:
    source = target = tensor
    if how.single and touching and (whole := touching[0][1].whole):
        source = whole
        if _resizable(tensor) and whole.shape[1:] == tensor.shape[1:]:
            target = replace(tensor, shape=whole.shape)
        touching = [(i, replace(patch, whole=None)) for i, patch in touching]
        touching = [(i, patch) for i, patch in touching if patch != Patch()]
    fitted = []
    for i, patch in touching:
        if patch.lora:
            patch = replace(patch, lora=_oriented(patch.lora, _matrix(patch.lora, target)))
        _check(patch, target, adapters[i])
        fitted.append((i, patch))
    if source.shape != target.shape:
        raise _another(adapters[0], tensor, source.shape)
    if any(patch.lora and patch.lora.stacked for _, patch in fitted):
        experts, rows, columns = source.shape
        source = replace(source, shape=(experts * rows, columns))
    return Edit(target, source, tuple(fitted))


def _resizable(tensor: Tensor) -> bool:
    return tensor.name.endswith((HEAD, *EMBEDDINGS))


def _matrix(lora: Lora, target: Tensor) -> tuple[int, int]:
    """The shape of what `lora` changes: one expert's, or the whole weight's; a kernel's dimensions are inputs."""
    shape = target.shape[1:] if lora.stacked else target.shape
    return shape[0], prod(shape[1:])


def _oriented(lora: Lora, matrix: tuple[int, int]) -> Lora:
    """`lora` with the orientation that its shapes show; a square weight leaves it to the configuration."""
    if matrix[0] != matrix[1] and matrix in (lora.shape, lora.shape[::-1]):
        return replace(lora, transposed=matrix != lora.shape)
    return lora


def _check(patch: Patch, target: Tensor, adapter: Adapter) -> None:
    if patch.lora:
        shape = patch.lora.shape[::-1] if patch.lora.transposed else patch.lora.shape
        if shape != _matrix(patch.lora, target):
            raise _another(adapter, target, shape)
        if patch.lora.a.shape[0] % patch.lora.expert[1]:  # for another number of experts
            raise _another(adapter, target, patch.lora.a.shape)
    for given in (patch.whole, patch.bias and patch.bias[0]):
        if given and given.shape != target.shape:
            raise _another(adapter, target, given.shape)
    if patch.tokens:
        values = patch.tokens.values.shape
        if values[1:] != target.shape[1:] or max(patch.tokens.indices) >= target.shape[0]:
            raise _another(adapter, target, (max(patch.tokens.indices) + 1, *values[1:]))


def _another(adapter: Adapter, tensor: Tensor, shape: tuple[int, ...]) -> SuiteError:
    module = tensor.name.removesuffix(".weight")
    text = f"the adapter is for another base: '{module}' is {_by(tensor.shape)} there and {_by(shape)} in the adapter"
    return SuiteError(text, where=str(adapter.folder), hint=_trained_on(adapter))


def _trained_on(adapter: Adapter) -> str:
    hint = "give the base that this adapter was trained on"
    name = adapter.config.get("base_model_name_or_path")
    return f"{hint}: '{Path(name).name}'" if name else hint


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _lay(adapter: Adapter, names: set[str], base: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Patch]:
    """The adapter's patches by the names of the merged checkpoint."""
    laid: dict[str, Patch] = {}
    for name, patch in sorted(adapter.patches.items()):
        if on_disk := next((n for n in _names(name) if n in names), None):
            if patch.lora and name.endswith(FUSED) and len(base[on_disk].shape) == 3:
                patch = replace(patch, lora=_stacked(patch.lora, base[on_disk], config))
            laid[on_disk] = patch
        elif patch.lora and (experts := _experts(name, base)):
            laid |= {n: Patch(lora=replace(patch.lora, expert=expert, rows=rows)) for n, expert, rows in experts}
        else:
            module = name.removesuffix(".weight")
            raise SuiteError(
                f"the adapter is for another base: it changes '{module}', which this one does not have",
                where=str(adapter.folder),
                hint=_trained_on(adapter),
            )
    return laid


def _stacked(lora: Lora, tensor: Tensor, config: Mapping[str, Any]) -> Lora:
    """`lora` of a weight (experts, rows, columns) that holds all experts of a layer."""
    inputs_first = config.get("model_type") in INPUTS_FIRST
    return replace(lora, expert=(0, tensor.shape[0]), stacked=True, transposed=inputs_first)


def _names(name: str) -> list[str]:
    return [name, *(pattern.sub(other, name) for pattern, other in ON_DISK)]


def _experts(name: str, base: Mapping[str, Tensor]) -> list[tuple[str, tuple[int, int], tuple[int, int] | None]]:
    """The tensors of single experts that the parameter `name` holds in memory: name, which of how many, which rows."""
    module, _, parameter = name.rpartition(".")
    for place in _names(f"{module}."):
        for leaves in LEAVES.get(parameter, ()):
            if f"{place}0.{leaves[0]}.weight" not in base:
                continue
            count = next(n for n in range(len(base) + 1) if f"{place}{n}.{leaves[0]}.weight" not in base)
            found = []
            for i in range(count):
                first = 0
                for leaf in leaves:
                    tensor = base[f"{place}{i}.{leaf}.weight"]
                    rows = (first, first + tensor.shape[0]) if len(leaves) > 1 else None
                    first += tensor.shape[0]
                    found.append((tensor.name, (i, count), rows))
            return found
    return []


def _configured(
    config: Mapping[str, Any], base: Mapping[str, Tensor], edits: Sequence[Edit], embedding: str, tied: bool
) -> dict[str, Any]:
    """The base's configuration with what the merge changed: the tie, and the number of tokens."""
    changed = {**config, **({"tie_word_embeddings": tied} if embedding else {})}
    rows = {e.target.name: e.target.shape[0] for e in edits if e.target.name in (embedding, HEAD)}
    if len(set(rows.values())) > 1:
        raise SuiteError(
            f"the adapter is for another base: merged, the embedding would be of {rows[embedding]} tokens, "
            f"the head of {rows[HEAD]}",
            hint="an adapter with new tokens must hold both: modules_to_save = ['embed_tokens', 'lm_head']",
        )
    # a base may have more rows than tokens: only where their number changed, they are the vocabulary's size
    if embedding and rows[embedding] != base[embedding].shape[0]:
        if isinstance(inner := changed.get("text_config"), dict):
            changed["text_config"] = {**inner, "vocab_size": rows[embedding]}
        if "vocab_size" in changed:
            changed["vocab_size"] = rows[embedding]
    return changed
