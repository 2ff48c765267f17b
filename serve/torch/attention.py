"""Attention over rows of different lengths, for every transformers model that builds its masks with masking_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "slots"


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: torch.Tensor,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., torch.Tensor],
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """True where a query sees a key, (B, 1, Q, T); `q_offset` (B,) is where each row's queries start.

    `mask_function` is the model's own rule (causal, sliding window, chunked) on positions, so each kind is right.
    """
    batch = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    query = (q_offset[:, None] + torch.arange(q_length, device=device))[:, None, :, None]
    key = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    return mask_function(batch, head, query, key).expand(batch_size, 1, q_length, kv_length)


def slot_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention that copies no key: the heads of a group become more queries of their one key head.

    query: (B, H, Q, D), key and value: (B, K, T, D) with K kv_heads, attention_mask: (B, 1, Q, T) -> (B, Q, H, D).
    """
    rows, heads, width, dim = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(rows, key.shape[1], groups * width, dim)
        if width > 1:
            attention_mask = attention_mask.repeat(1, 1, groups, 1)
    if softcap is None:
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    else:
        out = _capped(query, key, value, attention_mask, dim**-0.5 if scaling is None else scaling, softcap)
    return out.reshape(rows, heads, width, -1).transpose(1, 2), None


def _capped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float, softcap: float
) -> torch.Tensor:
    """softmax(cap * tanh(q k / cap)) v, as in Gemma 2 (arXiv:2408.00118, section 2)."""
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def register() -> str:
    """Make both known to transformers; returns the name to load a model with."""
    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, slot_mask)
    return NAME
