"""One forward pass of a step: token ids, positions, cache and adapters in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from serve.generation import Generation
from serve.torch.adapters import Adapters
from serve.torch.cache import SlotCache, whole
from serve.torch.layers import call
from serve.torch.scheduler import Step
from serve.torch.stack import Stack


class Forward:
    """A model, the keys and values of the rows that run, and the adapters that they ask for."""

    def __init__(self, model: Any, adapters: Adapters, cache: SlotCache) -> None:
        self.model, self.adapters, self.cache = model, adapters, cache
        self.hidden: torch.Tensor | None = None
        """The last hidden states of a step, (B, Q, hidden size), where a row is to be embedded."""
        self._device = model.device
        self._embed = False
        self._keep: torch.Tensor | None = None
        stack = vars(model).get("forward")
        if isinstance(stack, Stack):
            stack.before_head = self._last
        else:
            model.get_output_embeddings().register_forward_pre_hook(
                lambda _, inputs: (self._last(inputs[0]), *inputs[1:])
            )

    def clear(self) -> None:
        """Give the cache's memory back; all rows are lost."""
        self.cache.clear()

    def run(self, step: Step, running: Sequence[Generation]) -> torch.Tensor:
        """Logits (B, 1, V) of each row's last token, or (B, Q, V) where a row wants its prompt scored.

        `running` are all rows that the cache must have room for.
        """
        self.cache.keep(step.keeps)
        device, width = self._device, step.width
        if width == 1:
            ids = [row.tokens[row.cached] for row in step.rows]
        else:
            ids = [
                token
                for row, read in zip(step.rows, step.counts, strict=True)
                for token in row.tokens[row.cached : row.cached + read] + [0] * (width - read)
            ]
        self.cache.arrange(step.moves, *step.shape(running))
        self.cache.load(step.loads)
        self.cache.begin(step.first, [row.cached for row in step.rows], width, device)
        self.adapters.select(step.rows, width)
        self._embed = any(row.request.embed for row in step.rows)
        scoring = any(row.request.prompt_logprobs is not None for row in step.rows)
        positions, self._keep = self.cache.positions, None
        if width > 1:
            last = torch.tensor(step.counts, device=device) - 1
            if not scoring:
                self._keep = last
            # padding repeats the last position: models with a position table have none behind max_length
            positions = torch.minimum(positions, positions[:, :1] + last[:, None])
        logits: torch.Tensor = call(self.model)(
            input_ids=whole(ids, device).view(-1, width),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def _last(self, hidden: torch.Tensor) -> torch.Tensor:
        """Before the output layer, (B, Q, hidden): logits of a whole prompt are large, and only the last is sampled."""
        self.hidden = hidden if self._embed else None
        if self._keep is None:
            return hidden
        last = self._keep.to(hidden.device)  # with layers on several, the last of them need not be the first's
        return hidden[torch.arange(len(last), device=hidden.device), last][:, None]
