"""Layers of a loaded model remade of fewer, wider operations: on small batches their number is what a step costs.

    q_proj, k_proj, v_proj   ->  qkv_proj       one matrix product; one norm and one rotation of queries and keys
    gate_proj, up_proj       ->  gate_up_proj   one matrix product
    ...RMSNorm               ->  FusedNorm      4 operations for 7
    ...RotaryEmbedding       ->  FusedRotary    3 operations for 12

They are recognised by what they compute, not by the model's name: the model reads a few tokens, each candidate is given
the very inputs of the layer that it would replace, and takes its place where the outputs are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from serve.torch.attention import slot_attention
from serve.torch.cache import SlotCache

WIDE = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""The layers made, and those that each is made of."""
HEAD_NORMS = {"q_norm", "k_norm"}


class Part(NamedTuple):
    """Where a layer of the checkpoint lives now: columns `first` to `last` of what the layer `path` puts out."""

    path: str
    first: int
    last: int


class FusedRotary(nn.Module):
    """Cosines and sines of `position * frequency` (arXiv:2104.09864, section 3.4.2), frequencies being constant."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.frequencies = torch.cat((layer.inv_freq, layer.inv_freq))
        self._scaling: float = layer.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: (B, Q) -> two tables (B, Q, D) of the type of `x`."""
        angles = position_ids[:, :, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scaling != 1:
            cos, sin = cos * self._scaling, sin * self._scaling
        return cos.to(x.dtype), sin.to(x.dtype)


class Rotation:
    """Turns heads by those tables, which it prepares once a step for all layers.

    The halves of a head are the coordinates of its points: (a, b) becomes (a cos - b sin, b cos + a sin).
    """

    def __init__(self) -> None:
        self._tables: Any = None
        self._cos = self._sin = torch.empty(0)

    def __call__(self, heads: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """heads: (B, Q, H, D) -> the same shape."""
        half = heads.shape[-1] // 2
        if self._tables is not tables:
            cos, sin = tables
            self._tables, self._cos = tables, cos[:, :, None]
            self._sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)[:, :, None]
        return torch.addcmul(heads * self._cos, heads.roll(half, -1), self._sin)


class FusedNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467) over the last of n dimensions, in float32.

    With sqrt(mean(x^2) + eps) = hypot(|x|, sqrt(n eps)) / sqrt(n), and that last factor in the weight.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        # plain attributes: `nn.Module` is slow at finding parameters
        self.weight, self.eps = weight.detach(), eps
        self._gain = self.weight.float() * weight.shape[-1] ** 0.5
        self._floor = torch.tensor((weight.shape[-1] * eps) ** 0.5, device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., n) -> the same shape and type."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x.div(length.hypot_(self._floor)).mul_(self._gain).to(x.dtype)


class FusedAttention(nn.Module):
    """Causal self-attention of Llama, Mistral, Qwen, Gemma and their kin."""

    def __init__(self, layer: Any, rotation: Rotation) -> None:
        super().__init__()
        self.qkv_proj = _wide([layer.q_proj, layer.k_proj, layer.v_proj])
        self.o_proj = layer.o_proj
        self._dim: int = layer.head_dim
        queries, keys = (len(proj.weight) // self._dim for proj in (layer.q_proj, layer.k_proj))
        self._turned, self._heads = (queries + keys, keys), (queries, keys)
        self._scaling: float = layer.scaling
        self._softcap: float | None = getattr(layer, "attn_logit_softcapping", None)
        self._layer: int = layer.layer_idx
        self._rotation = rotation
        self.norm: FusedNorm | None = None
        if hasattr(layer, "q_norm"):
            weights = layer.q_norm.weight.expand(queries, -1), layer.k_norm.weight.expand(keys, -1)
            self.norm = FusedNorm(torch.cat(weights), layer.q_norm.eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: SlotCache,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: (B, Q, hidden) -> the same shape, and nothing where transformers has attention weights."""
        rows, width, _size = hidden_states.shape
        heads = self.qkv_proj(hidden_states).view(rows, width, -1, self._dim)  # (B, Q, H + 2 K, D)
        turned, value = heads.split_with_sizes(self._turned, 2)
        if self.norm is not None:
            turned = self.norm(turned)
        query, key = self._rotation(turned, position_embeddings).transpose(1, 2).split_with_sizes(self._heads, 1)
        keys, values = past_key_values.update(key, value.transpose(1, 2), self._layer)
        out, _weights = slot_attention(
            self, query, keys, values, attention_mask, scaling=self._scaling, softcap=self._softcap
        )
        return self.o_proj(out.flatten(2)), None


class FusedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gate_up_proj = _wide([layer.gate_proj, layer.up_proj])
        self.down_proj, self.act_fn = layer.down_proj, layer.act_fn
        self._sizes = layer.gate_proj.out_features, layer.up_proj.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden) -> the same shape."""
        gate, up = self.gate_up_proj(x).split_with_sizes(self._sizes, -1)
        out: torch.Tensor = self.down_proj(self.act_fn(gate).mul_(up))
        return out


def fuse(model: Any) -> dict[str, Part]:
    """Remake the layers of `model` in place; returns where each projection of the checkpoint is now, by its path.

    What is quantized, fused already, on several devices or computed in another way stays as it is. Weights are moved,
    not doubled: one layer at a time exists twice.
    """
    parts: dict[str, Part] = {}
    rotation = Rotation()

    def compare(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> None:
        for made in _candidates(layer, rotation):
            if _equal(made, args, kwargs, wanted):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, made.eval())
                parts.update(_parts(path, layer))
                return

    hooks = [
        layer.register_forward_hook(partial(compare, path), with_kwargs=True)
        for path, layer in model.named_modules()
        if (_is_attention(layer) or _is_mlp(layer) or _is_norm(layer) or _is_rotary(layer))
        and not any(hasattr(part, "_hf_hook") for part in layer.modules())  # accelerate's: it moves what goes in
    ]
    logits = _read_a_little(model)
    for hook in hooks:
        hook.remove()
    _call_directly(model, logits)
    return parts


def _call_directly(model: Any, logits: torch.Tensor) -> None:
    """Leave out what transformers wraps its models' `forward` in, to collect outputs that nobody asks for here."""
    outer = [layer for layer in (model, model.base_model) if "forward" not in vars(layer)]
    for layer in outer:
        layer.forward = MethodType(inspect.unwrap(type(layer).forward), layer)
    try:
        same = _near(_read_a_little(model), logits)
    except (AttributeError, TypeError):  # it needs what was left out
        same = False
    if not same:
        for layer in outer:
            del layer.forward


def _candidates(layer: Any, rotation: Rotation) -> Iterator[nn.Module]:
    """What may compute the same as `layer`; each is made when it is asked for."""
    if _is_mlp(layer):
        yield FusedMlp(layer)
    elif _is_norm(layer):
        yield FusedNorm(layer.weight, _eps(layer))
        yield FusedNorm(1 + layer.weight.float(), _eps(layer))  # as Gemma stores it
    elif _is_rotary(layer):
        yield FusedRotary(layer)
    # norms of all heads together would be one vector of another size
    elif all(type(norm) is FusedNorm and len(norm.weight) == layer.head_dim for norm in _head_norms(layer)):
        yield FusedAttention(layer, rotation)


def _equal(made: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Any) -> bool:
    """Whether `made` gives what the layer gave, up to half of the digits of its type."""
    try:
        given = made(*args, **kwargs)
    except (RuntimeError, TypeError):  # another shape or call, as where only a part of each head is rotated
        return False
    if not isinstance(wanted, tuple):
        given, wanted = (given,), (wanted,)
    return len(given) == len(wanted) and all(map(_near, given, wanted))


def _near(given: Any, wanted: Any) -> bool:
    if not isinstance(given, torch.Tensor) or given.shape != wanted.shape:
        return given is None  # attention weights, which only the slowest kind of attention has
    return bool((given - wanted).abs().max() <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max())


def _read_a_little(model: Any) -> torch.Tensor:
    """Logits of two rows of three tokens, one of them at the far end of what the model can read."""
    far = (getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048) - 3
    near = torch.arange(3, device=model.device)
    cache = SlotCache(0, 1)
    cache.fit(2, 3)
    cache.begin(0, [0, 0], 3, model.device)
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=torch.stack((near + 1, near + 4)),
            position_ids=torch.stack((near, near + far)),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits


def _parts(path: str, layer: Any) -> dict[str, Part]:
    for wide, names in WIDE.items():
        if hasattr(layer, names[0]):
            ends = torch.tensor([0, *(getattr(layer, name).out_features for name in names)]).cumsum(0).tolist()
            return {f"{path}.{name}": Part(f"{path}.{wide}", *ends[i : i + 2]) for i, name in enumerate(names)}
    return {}


def _wide(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer that puts out what all of `layers` do, side by side."""
    made = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    made.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if layers[0].bias is not None:
        made.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return made


def _is_attention(layer: nn.Module) -> bool:
    arguments = inspect.signature(type(layer).forward).parameters.keys()
    return (
        _joins(layer, WIDE["qkv_proj"], "o_proj")
        and _children(layer) - {*WIDE["qkv_proj"], "o_proj"} in (set(), HEAD_NORMS)
        and vars(layer).keys() >= {"head_dim", "scaling", "layer_idx"}
        and arguments >= {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
        and getattr(layer.config, "clip_qkv", None) is None  # OLMo's: so few tokens may not show it
    )


def _is_mlp(layer: nn.Module) -> bool:
    names = WIDE["gate_up_proj"]
    return _joins(layer, names, "down_proj") and _children(layer) == {*names, "down_proj", "act_fn"}


def _is_norm(layer: nn.Module) -> bool:
    named = type(layer).__name__.endswith("RMSNorm") and type(layer) is not nn.RMSNorm
    return named and [name for name, _ in layer.named_parameters()] == ["weight"] and _eps(layer) is not None


def _is_rotary(layer: nn.Module) -> bool:
    # the other kinds, dynamic and longrope, change their frequencies with the length
    constant = getattr(layer, "rope_type", None) in ("default", "linear", "llama3", "yarn")
    return constant and {name for name, _ in layer.named_buffers()} == {"inv_freq", "original_inv_freq"}


def _joins(layer: nn.Module, names: Sequence[str], last: str) -> bool:
    """Whether plain linear layers of these names, on one device, hold all that `layer` has learnt."""
    linear: list[Any] = [getattr(layer, name, None) for name in (*names, last)]
    return (
        all(type(part) is nn.Linear for part in linear)
        and len({(part.weight.device, part.weight.dtype, part.bias is None) for part in linear[:-1]}) == 1
        and not list(layer.parameters(recurse=False))
    )


def _children(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children()}


def _head_norms(layer: nn.Module) -> list[Any]:
    return [getattr(layer, name) for name in HEAD_NORMS if hasattr(layer, name)]


def _eps(layer: Any) -> Any:
    return getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
