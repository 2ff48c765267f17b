"""One way to ask whatever answers: a model of transformers, one that is streamed, or an object that gives logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from export.streaming import Streamed

Tell = Callable[[float], None]
"""Hears which share of the work is done."""


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
    def answers(self, prompts: Sequence[list[int]], stops: Sequence[Collection[int]], tell: Tell) -> list[list[int]]:
        """The greedy answer to each prompt, up to and with one of its stop tokens.

        All grow together: a step reads the weights once for all of them.
        """
        device, longest = self.model.device, max(map(len, prompts))
        # the shorter ones begin behind padding that the mask hides
        step = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        positions, past = (mask.cumsum(-1) - 1).clamp_min(0), None
        found: list[list[int]] = [[] for _ in prompts]
        for i in range(self.tokens):
            seen = {"attention_mask": mask, "position_ids": positions, "past_key_values": past}
            out = self.model(input_ids=step, **seen, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            step = out.logits[:, -1:].argmax(-1)
            for answer, ends, token in zip(found, stops, step[:, 0].tolist(), strict=True):
                if not ended(answer, ends):
                    answer.append(token)
            tell((i + 1) / self.tokens)
            if all(map(ended, found, stops)):
                break
            mask = torch.cat([mask, torch.ones_like(step)], 1)
            positions = positions[:, -1:] + 1
        return found

    def each(self, questions: Sequence[Callable[[], Any]], tell: Tell) -> list[Any]:
        """The results of `questions`, each of which asks for logits once."""
        results = []
        for i, question in enumerate(questions, 1):
            results.append(question())
            tell(i / len(questions))
        return results

    def passes(self, questions: int) -> int:
        """How many times the weights are read for the logits of that many."""
        return questions


class AnsweringStreamed(Answering):
    """A model whose weights come from the disk; all questions are asked together."""

    model: Streamed
    how = "parity, layer by layer"
    tokens = 8
    """Each is one more pass over all weights."""

    def answers(self, prompts: Sequence[list[int]], stops: Sequence[Collection[int]], tell: Tell) -> list[list[int]]:
        """Each on its own, in passes that all of them share."""
        asked = [partial(self._answer, ids, ends) for ids, ends in zip(prompts, stops, strict=True)]
        return self._together(asked, tell, self.tokens)

    def each(self, questions: Sequence[Callable[[], Any]], tell: Tell) -> list[Any]:
        """All of them share one pass over the weights."""
        return self._together(questions, tell, 1)

    def passes(self, _questions: int) -> int:
        """One."""
        return 1

    def _together(self, questions: Sequence[Callable[[], Any]], tell: Tell, passes: int) -> list[Any]:
        total = len(self.model.units) * passes
        return self.model.together(questions, lambda read: tell(min(read / total, 1.0)))

    def _answer(self, ids: list[int], stops: Collection[int]) -> list[int]:
        step, past = torch.tensor([ids], device=self.model.device), None
        found: list[int] = []
        while len(found) < self.tokens and not ended(found, stops):
            out = self.model(input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            step = out.logits[:, -1:].argmax(-1)
            found.append(int(step))
        return found


class AnsweringGiven(Answering):
    """An object that gives logits."""

    model: Gives

    def logits(self, ids: list[int]) -> torch.Tensor:
        """As it gives them."""
        return torch.as_tensor(self.model.logits(ids)).float()

    def answers(self, prompts: Sequence[list[int]], stops: Sequence[Collection[int]], tell: Tell) -> list[list[int]]:
        """By its own `greedy`, else token by token."""
        found = []
        for ids, ends in zip(prompts, stops, strict=True):
            found.append(self._answer(ids, ends))
            tell(len(found) / len(prompts))
        return found

    def _answer(self, ids: list[int], stops: Collection[int]) -> list[int]:
        if greedy := getattr(self.model, "greedy", None):
            return list(greedy(ids, self.tokens, stops))
        found: list[int] = []
        while len(found) < self.tokens and not ended(found, stops):
            found.append(int(self.logits([*ids, *found])[-1].argmax()))
        return found


def ended(answer: Sequence[int], stops: Collection[int]) -> bool:
    """Whether an answer is complete before it is as long as it may become."""
    return bool(answer) and answer[-1] in stops


def answering(model: Any) -> Answering:
    """`model`, ready to be asked."""
    if isinstance(model, Streamed):
        return AnsweringStreamed(model)
    return AnsweringGiven(model) if hasattr(model, "logits") else Answering(model)
