"""What is kept of a prompt while it is read: the scores of its tokens, and its embedding."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from serve.generation import Generation
from serve.torch.sampling import score
from serve.torch.scheduler import Step


def observe(step: Step, logits: torch.Tensor, hidden: torch.Tensor | None) -> None:
    """Score or pool what was read of prompts, but not what a preempted generation reads a second time.

    logits: (B, Q, V) where a row is to be scored; hidden: (B, Q, hidden size) where one is to be embedded.
    """
    for row, generation in enumerate(step.rows):
        request, begin = generation.request, generation.cached
        if begin >= len(request.prompt):
            continue
        first, last = max(begin, generation.observed), begin + step.counts[row]
        if request.prompt_logprobs is not None and (following := request.prompt[first + 1 : last + 1]):
            scored = logits[row, first - begin : first - begin + len(following)]
            generation.prompt_scores += score(scored, following, request.prompt_logprobs)
        if request.embed and hidden is not None:
            _pool(generation, hidden[row, first - begin : last - begin], last)
        if request.reads_all:
            generation.observed = max(generation.observed, last)


def _pool(generation: Generation, hidden: torch.Tensor, last: int) -> None:
    """Add the last hidden states (N, hidden size) before place `last` of the prompt to the embedding."""
    whole = last == len(generation.request.prompt)
    if generation.request.embed == "mean":
        total = hidden.float().sum(0)
        if generation.embedding:
            total += torch.tensor(generation.embedding, device=total.device)
        generation.embedding = (normalize(total, dim=0) if whole else total).tolist()
    elif whole:
        generation.embedding = normalize(hidden[-1].float(), dim=0).tolist()
