"""The next token of every row, each by its own rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from serve.generation import Sampling, Scored


def sample(logits: torch.Tensor, rules: Sequence[Sampling]) -> list[int]:
    """One token id for each row of `logits` (B, V), by the rule of the same index."""
    picked: list[int] = logits.argmax(-1).tolist()
    rows = [i for i, rule in enumerate(rules) if rule.temperature > 0]
    if rows:
        chosen = _draw(logits[rows].float(), [rules[i] for i in rows])
        for row, token in zip(rows, chosen, strict=True):
            picked[row] = token
    return picked


def _draw(logits: torch.Tensor, rules: list[Sampling]) -> list[int]:
    """Invert the distribution function at one uniform number a row, so a row's token depends on that row alone."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    scaled = logits / column([rule.temperature for rule in rules])
    vocabulary = logits.shape[-1]
    limits = [min(rule.top_k, vocabulary) if rule.top_k > 0 else vocabulary for rule in rules]
    ranked, ids = scaled.topk(max(limits), dim=-1)  # likeliest first
    ranked.masked_fill_(torch.arange(ranked.shape[1], device=logits.device) >= column(limits), float("-inf"))
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # nucleus: the smallest set that reaches top_p, so a token stays while those before it do not (arXiv:1904.09751)
    probabilities.masked_fill_((before >= column([rule.top_p for rule in rules])) & (before > 0), 0.0)
    reached = probabilities.cumsum(-1)
    target = column([rule.random.random() for rule in rules]) * reached[:, -1:]
    index = torch.searchsorted(reached, target, right=True).clamp_(max=ranked.shape[1] - 1)
    # rounding may land the search behind the last token that is left in
    index = torch.minimum(index, (probabilities > 0).sum(-1, keepdim=True) - 1)
    return ids.gather(-1, index)[:, 0].tolist()


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log probabilities in nats. logits: (N, V), one row for each of `tokens`."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if top == 0:
        return [Scored(token, value, []) for token, value in zip(tokens, own, strict=True)]
    values, ids = (t.tolist() for t in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    return [Scored(t, o, list(zip(i, v, strict=True))) for t, o, i, v in zip(tokens, own, ids, values, strict=True)]
