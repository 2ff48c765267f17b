"""A whole model as one function, where all of its layers were remade: modules within modules cost more than they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers.masking_utils import causal_mask_function

from serve.torch.attention import slot_mask
from serve.torch.cache import SlotCache
from serve.torch.layers import FusedAttention, FusedMlp, FusedNorm, FusedRotary, call
from serve.torch.native.decoder import Block, Decoder, Model

LAYER = {
    "input_layernorm": FusedNorm,
    "self_attn": FusedAttention,
    "post_attention_layernorm": FusedNorm,
    "mlp": FusedMlp,
}


class Output(NamedTuple):
    """What a forward pass gives: logits (B, Q, V)."""

    logits: torch.Tensor


class Stack:
    """Embedding, layers of attention and MLP with a norm before each, norm, output: Llama, Mistral, Qwen and their kin.

    Whether it computes what the model does is for its maker to compare; that masks are causal and no more, `fits` says.
    """

    def __init__(self, model: Any) -> None:
        base = model.base_model
        self._embedding: torch.Tensor = base.embed_tokens.weight
        self._rotary, self._norm, self._head = base.rotary_emb, base.norm, model.get_output_embeddings()
        self._layers = [Block(*(getattr(layer, name) for name in LAYER)) for layer in base.layers]
        parts = Model(self._embedding, self._rotary, self._layers, self._norm)
        self.before_head: Callable[[torch.Tensor], torch.Tensor] = lambda hidden: hidden
        """What the output layer is given of the last hidden states (B, Q, hidden)."""
        self.decoder = Decoder(parts) if Decoder.fits(parts) else None
        """What computes a token of each row; without it, that is done as prompts are read."""

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether `model` is made of the parts that are called here, and of no others."""
        base = model.base_model
        return (
            {name for name, _ in base.named_children()} == {"embed_tokens", "layers", "norm", "rotary_emb"}
            and (type(base.rotary_emb), type(base.norm)) == (FusedRotary, FusedNorm)
            and all({name: type(part) for name, part in layer.named_children()} == LAYER for layer in base.layers)
            and all(layer.self_attn.causal for layer in base.layers)
            and not any(hasattr(part, "_hf_hook") for part in model.modules())
        )

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: SlotCache,
        **_: Any,
    ) -> Output:
        """input_ids and position_ids: (B, Q)."""
        rows, width = input_ids.shape
        if width == 1 and self.decoder is not None:
            return self._output(self.decoder(input_ids, past_key_values))
        hidden = functional.embedding(input_ids, self._embedding)  # (B, Q, hidden)
        tables = self._rotary.forward(hidden, position_ids)
        mask = slot_mask(
            rows,
            width,
            past_key_values.length,
            past_key_values.starts,
            mask_function=causal_mask_function,
            dtype=hidden.dtype,
            device=hidden.device,
        )
        for before_attention, attention, before_mlp, mlp in self._layers:
            hidden += attention.forward(before_attention.forward(hidden), tables, mask, past_key_values)[0]
            hidden += mlp.forward(before_mlp.forward(hidden))
        return self._output(self._norm.forward(hidden))

    def _output(self, hidden: torch.Tensor) -> Output:
        return Output(call(self._head)(self.before_head(hidden)))
