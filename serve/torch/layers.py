"""Layers of fewer, wider operations than those of transformers, which they are made of (`serve.torch.fused`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn import functional

from serve.torch.attention import slot_attention
from serve.torch.cache import SlotCache


class Adapting(Protocol):
    """What adapters do to the output of a layer."""

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Change the output for `x` in place."""

    def at(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], object]:
        """What does so again and again, for tensors that stay where they are."""


class Projection(nn.Linear):
    """Linear layers side by side: one that puts out what all of `layers` do.

    It is called directly, without what `nn.Module` looks after.
    """

    adapted: ClassVar = 0
    """How often one of them was given what adapts it."""

    def __init__(self, *layers: nn.Linear) -> None:
        widths = [layer.out_features for layer in layers]
        super().__init__(layers[0].in_features, sum(widths), bias=False, device="meta")
        self.weight = _joined([layer.weight for layer in layers])
        if layers[0].bias is not None:
            self.bias = _joined([layer.bias for layer in layers])
        self._tensors = self.weight, self.bias  # which `nn.Module` is slow at finding
        self.adapting: Adapting | None = None

    def adapt_by(self, adapting: Adapting) -> None:
        """Change its output from now on."""
        self.adapting = adapting
        Projection.adapted += 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in) -> (..., out)."""
        output = functional.linear(x, *self._tensors)
        if self.adapting is not None:
            self.adapting.add(x, output)
        return output


class FusedRotary(nn.Module):
    """Cosines and sines of `position * frequency` (arXiv:2104.09864, section 3.4.2), frequencies being constant."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.frequencies = torch.cat((layer.inv_freq, layer.inv_freq))
        self.scaling: float = layer.attention_scaling

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: (B, Q) -> two tables (B, Q, D) of the type of `x`."""
        angles = position_ids[:, :, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1:
            cos, sin = cos * self.scaling, sin * self.scaling
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
        # plain attributes here too
        self.weight, self.eps = weight.detach(), eps
        self.gain = self.weight.float() * weight.shape[-1] ** 0.5
        self._floor = torch.tensor((weight.shape[-1] * eps) ** 0.5, device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., n) -> the same shape and type."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x.div(length.hypot_(self._floor)).mul_(self.gain).to(x.dtype)


class FusedAttention(nn.Module):
    """Causal self-attention of Llama, Mistral, Qwen, Gemma and their kin."""

    def __init__(self, layer: Any, rotation: Rotation) -> None:
        super().__init__()
        self.qkv_proj = Projection(layer.q_proj, layer.k_proj, layer.v_proj)
        self.o_proj = Projection(layer.o_proj)
        self.dim: int = layer.head_dim
        queries, keys = (len(proj.weight) // self.dim for proj in (layer.q_proj, layer.k_proj))
        self._turned, self.heads = (queries + keys, keys), (queries, keys)
        self.scaling: float = layer.scaling
        self.softcap: float | None = getattr(layer, "attn_logit_softcapping", None)
        self.layer: int = layer.layer_idx
        self._rotation = rotation
        self.causal = False
        """Whether its mask hides what comes later, and nothing else."""
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
        heads = self.qkv_proj(hidden_states).view(rows, width, -1, self.dim)  # (B, Q, H + 2 K, D)
        turned, value = heads.split_with_sizes(self._turned, 2)
        if self.norm is not None:
            turned = self.norm.forward(turned)
        query, key = self._rotation(turned, position_embeddings).transpose(1, 2).split_with_sizes(self.heads, 1)
        keys, values = past_key_values.update(key, value.transpose(1, 2), self.layer)
        out, _weights = slot_attention(
            self, query, keys, values, attention_mask, scaling=self.scaling, softcap=self.softcap
        )
        return self.o_proj(out.flatten(2)), None


class FusedMlp(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gate_up_proj = Projection(layer.gate_proj, layer.up_proj)
        self.down_proj, self.act_fn = Projection(layer.down_proj), layer.act_fn
        self.sizes = layer.gate_proj.out_features, layer.up_proj.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden) -> the same shape."""
        gate, up = self.gate_up_proj(x).split_with_sizes(self.sizes, -1)
        out: torch.Tensor = self.down_proj(self.act_fn(gate).mul_(up))
        return out


def _joined(tensors: Sequence[torch.Tensor]) -> nn.Parameter:
    return nn.Parameter(tensors[0] if len(tensors) == 1 else torch.cat([*tensors]), requires_grad=False)


def call(module: nn.Module) -> Callable[..., Any]:
    """What calls a module: its `forward` alone where nothing is hooked to it, without what `nn.Module` looks after."""
    return module if module._forward_hooks or module._forward_pre_hooks else module.forward
