"""Attention over rows of different lengths, for every transformers model that builds its masks with masking_utils."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

NAME = "slots"
OWN = "slots-own"
"""For models that compute attention by themselves, and so have to be told what is hidden."""


def explicit_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: Any,
) -> torch.Tensor:
    """What to add to the scores: 0 where a query sees a key, else -inf, (B, 1, Q, T). Made once a step.

    `q_offset` is where each row's queries start: (B,), or one number for all. `mask_function` is the model's own rule
    (causal, sliding window, chunked) on positions, so each kind is right.
    """
    query = torch.arange(q_length, device=device)[:, None]
    query = query + (q_offset if isinstance(q_offset, int) else q_offset[:, None, None, None])
    key = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    if mask_function is causal_mask_function:
        seen = key <= query
    else:
        batch = torch.arange(batch_size, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        seen = mask_function(batch, head, query, key)
    seen = seen.expand(batch_size, 1, q_length, kv_length)
    return torch.zeros((), dtype=dtype, device=device).where(seen, float("-inf"))


def slot_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    *offset: int,
    mask_function: Callable[..., torch.Tensor],
    **options: Any,
) -> torch.Tensor | None:
    """The same, with None for what `slot_attention` needs no mask for.

    That is one query a row that sees all keys, or queries from the first position on that see those before them.
    """
    if mask_function is causal_mask_function and isinstance(q_offset, int) and 1 in (q_length, q_offset + 1):
        return None
    return explicit_mask(batch_size, q_length, kv_length, q_offset, *offset, mask_function=mask_function, **options)


def slot_attention(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Grouped-query attention. While decoding, the heads of a group become queries of their one key head: no copy.

    query: (B, H, Q, D), key and value: (B, K, T, D) with K kv_heads, attention_mask: (B, 1, Q, T) or None as made by
    `slot_mask`, s_aux: (H,), a score of attending to nothing -> (B, Q, H, D).
    """
    rows, heads, width, dim = query.shape
    if softcap is not None or s_aux is not None:
        return _by_hand(query, key, value, attention_mask, scaling or dim**-0.5, softcap, s_aux), None
    if width > 1:
        causal, grouped = attention_mask is None, heads > key.shape[1]
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    query = query.reshape(rows, key.shape[1], -1, dim)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


def _by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Scores capped as in Gemma 2 (arXiv:2408.00118, section 2), or with a sink as in gpt-oss (arXiv:2508.10925)."""
    rows, heads, width, dim = query.shape
    groups = heads // key.shape[1]
    scores = query.reshape(rows, -1, groups * width, dim) @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(rows, -1, groups, width, scores.shape[-1])  # (B, K, H / K, Q, T)
    if mask is None and width > 1:
        mask = torch.full((1, 1, width, width), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    if mask is not None:
        scores = scores + mask[:, :, None]
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, groups, 1, 1).expand(rows, -1, -1, width, 1)), -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    return (weights.flatten(2, 3) @ value).view(rows, heads, width, -1).transpose(1, 2)


def register() -> str:
    """Make all of it known to transformers; returns the name to load a model with that asks for an attention."""
    AttentionInterface.register(NAME, slot_attention)
    AttentionMaskInterface.register(NAME, slot_mask)
    AttentionMaskInterface.register(OWN, explicit_mask)
    return NAME
