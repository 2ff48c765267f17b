"""One way to ask whatever answers: a model of transformers, one that is streamed, or an object that gives logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch

from export.streaming import Streamed


class Gives(Protocol):
    """An object that gives logits, such as a GGUF file in llama.cpp; a `greedy(ids, n, stops)` of its own is used."""

    def logits(self, ids: list[int]) -> Any:
        """Of the next token at each position, float32 (T, V): a tensor or an array."""


class Answering:
    """A model of transformers."""

    how = "parity"
    """What a progress bar calls it."""
    tokens = 16
    """Of a greedy answer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of the next token at each position, (T, V) float32 in the CPU's memory."""
        asked = torch.tensor([ids], device=self.model.device)
        logits: torch.Tensor = self.model(input_ids=asked, use_cache=False).logits
        return logits[0].float().cpu()

    @torch.inference_mode()
    def answered(self, ids: list[int], stops: Collection[int]) -> list[int]:
        """`ids` with the greedy answer after them, up to and with a stop token."""
        found, past = list(ids), None
        step = torch.tensor([found], device=self.model.device)
        for _ in range(self.tokens):
            out = self.model(input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(int(out.logits[0, -1].argmax()))
            if found[-1] in stops:
                break
            step = torch.tensor([found[-1:]], device=self.model.device)
        return found

    def each(self, questions: Sequence[Callable[[], Any]], tell: Callable[[float], None], _passes: int) -> list[Any]:
        """The results of `questions`, each at most `_passes` calls in a row; `tell` hears which share is done."""
        results = []
        for i, question in enumerate(questions, 1):
            results.append(question())
            tell(i / len(questions))
        return results


class AnsweringStreamed(Answering):
    """A model whose weights come from the disk; all questions are asked together."""

    model: Streamed
    how = "parity, layer by layer"
    tokens = 8
    """Each is one more pass over all weights."""

    def each(self, questions: Sequence[Callable[[], Any]], tell: Callable[[float], None], _passes: int) -> list[Any]:
        """All of them share each pass over the weights."""
        total = len(self.model.units) * _passes
        return self.model.together(questions, lambda read: tell(min(read / total, 1.0)))


class AnsweringGiven(Answering):
    """An object that gives logits."""

    model: Gives

    def logits(self, ids: list[int]) -> torch.Tensor:
        """As it gives them."""
        return torch.as_tensor(self.model.logits(ids)).float()

    def answered(self, ids: list[int], stops: Collection[int]) -> list[int]:
        """By its own `greedy`, else token by token."""
        if greedy := getattr(self.model, "greedy", None):
            return [*ids, *greedy(ids, self.tokens, stops)]
        found = list(ids)
        for _ in range(self.tokens):
            found.append(int(self.logits(found)[-1].argmax()))
            if found[-1] in stops:
                break
        return found


def answering(model: Any) -> Answering:
    """`model`, ready to be asked."""
    if isinstance(model, Streamed):
        return AnsweringStreamed(model)
    return AnsweringGiven(model) if hasattr(model, "logits") else Answering(model)
