"""The next token of every row, each by its own rules; what a row draws depends on no other.

    bias ──> penalties ──> held back, grammar ──> temperature ──> min_p ──> top_k ──> top_p ──> draw

Rows without any rule take the likeliest token, at no cost but finding it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from serve.generation import Generation, Sampling, Scored
from serve.grammar import allowed

COLDEST = 1e-3
"""Lower temperatures count as this one, which leaves only ties to chance; far below it logits overflow."""
NARROW = 64
"""So many of the likeliest tokens are sorted for `top_p` at first: they nearly always reach it."""


class Sampler:
    """Picks tokens, and remembers of each generation what its rules need, as long as the generation lives."""

    def __init__(self) -> None:
        self._memories: WeakKeyDictionary[Generation, _Memory] = WeakKeyDictionary()
        self._batch: _Batch | None = None

    def sample(self, generations: Sequence[Generation], logits: torch.Tensor) -> list[int]:
        """One token id for each row of `logits` (B, V), which stay as they are."""
        batch = self._batch
        if batch is None or batch.generations != generations:
            memories = [self._memory(generation) for generation in generations if _has_rules(generation)]
            batch = self._batch = _Batch(generations, memories, logits)
        if len(batch.ruled) == len(generations):
            return batch.pick(logits.to(torch.float32, copy=True))
        picked = _likeliest(logits)
        if batch.ruled:
            for row, token in zip(batch.ruled, batch.pick(logits[batch.ruled].float()), strict=True):
                picked[row] = token
        return picked

    def _memory(self, generation: Generation) -> _Memory:
        if generation not in self._memories:
            self._memories[generation] = _Memory(generation)
        return self._memories[generation]


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Scored]:
    """Log probabilities in nats. logits: (N, V), one row for each of `tokens`."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    if top == 0:
        return [Scored(token, value, []) for token, value in zip(tokens, own, strict=True)]
    values, ids = (t.tolist() for t in logprobs.topk(min(top, logprobs.shape[-1]), dim=-1))
    return [Scored(t, o, list(zip(i, v, strict=True))) for t, o, i, v in zip(tokens, own, ids, values, strict=True)]


def spoilt(logits: torch.Tensor, counts: Sequence[int]) -> list[int]:
    """The rows of `logits` (B, Q, V) that have NaN or infinity at a place that counts: the first `counts` of each."""
    if math.isfinite(logits.sum(dtype=torch.float32)):
        return []  # nearly always, and quickly known
    largest = logits.amax(-1).isfinite()  # (B, Q): -inf, which nobody draws, may be among them
    return [row for row, count in enumerate(counts) if not largest[row, :count].all()]


class _Memory:
    """What the rules of one generation need of its past: random numbers, and the tokens that count for penalties."""

    def __init__(self, generation: Generation) -> None:
        request = generation.request
        self._random = Random(request.sampling.seed)
        self._number, self._place = 0.0, -1
        prompt = request.prompt if request.sampling.repetition_penalty != 1 else []
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._ids: NDArray[np.int64] = np.array(list(self._places), np.int64)
        self._counts: NDArray[np.float32] = np.zeros(len(self._places), np.float32)
        self._read = len(request.prompt)

    def number(self, place: int) -> float:
        """A random number for the token at `place` of the answer; the same one where a step is tried again."""
        if place != self._place:
            self._number, self._place = self._random.random(), place
        return self._number

    def seen(self, generation: Generation) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The distinct tokens, and how often each was generated: (N,) and (N,)."""
        for token in generation.tokens[self._read :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                more = len(self._ids) + 8
                self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
            self._ids[place] = token
            self._counts[place] += 1
        self._read = len(generation.tokens)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


class _Batch:
    """The rules of the generations of a batch as tensors, kept while the same ones run together.

    `ruled` are the R rows that have any rule; elsewhere rows are counted among these.
    """

    def __init__(self, generations: Sequence[Generation], memories: Sequence[_Memory], logits: torch.Tensor) -> None:
        self.generations = list(generations)
        self.ruled = [row for row, generation in enumerate(generations) if _has_rules(generation)]
        self._rows = rows = [generations[row] for row in self.ruled]
        self._memories = memories
        self._penalised = [row for row, generation in enumerate(rows) if _has_penalties(generation.request.sampling)]
        self._bound = [row for row, generation in enumerate(rows) if generation.matcher]
        held = [row for row, generation in enumerate(rows) if generation.request.min_tokens]
        self._drawn = [row for row, generation in enumerate(rows) if generation.request.sampling.temperature > 0]
        self._shape = _Shape([rows[row].request.sampling for row in self._drawn], logits)
        vocabulary = logits.shape[-1]
        self._stops = {row: [s for s in rows[row].request.stop_ids if s < vocabulary] for row in held}
        rules = [rows[row].request.sampling for row in self._penalised]
        self._penalties = np.array(
            [[rule.repetition_penalty, rule.frequency_penalty, rule.presence_penalty] for rule in rules], np.float32
        )
        biases = [
            (row * vocabulary + token, bias)
            for row, generation in enumerate(rows)
            for token, bias in generation.request.sampling.logit_bias.items()
        ]
        self._biased = torch.tensor([place for place, _ in biases], dtype=torch.long, device=logits.device)
        self._bias = torch.tensor([bias for _, bias in biases], dtype=torch.float32, device=logits.device)

    def pick(self, logits: torch.Tensor) -> list[int]:
        """One token for each row of `logits` (R, V) in float32, which are used up."""
        rows = self._rows
        if len(self._bias):
            logits.view(-1).index_add_(0, self._biased, self._bias)
        if self._penalised:
            self._penalise(logits)
        stops = {row: ids for row, ids in self._stops.items() if rows[row].count < rows[row].request.min_tokens}
        for row, ids in stops.items():
            if not rows[row].matcher:
                logits[row, ids] = float("-inf")
        if self._bound:
            self._bind(logits, stops)
        numbers = [self._memories[row].number(rows[row].count) for row in self._drawn]
        if len(self._drawn) == len(rows):
            return self._shape.draw(logits, numbers)
        picked = _likeliest(logits)
        if self._drawn:
            for row, token in zip(self._drawn, self._shape.draw(logits[self._drawn], numbers), strict=True):
                picked[row] = token
        return picked

    def _penalise(self, logits: torch.Tensor) -> None:
        seen = [self._memories[row].seen(self._rows[row]) for row in self._penalised]
        sizes = [len(ids) for ids, _ in seen]
        starts = np.repeat(np.array(self._penalised, np.int64) * logits.shape[-1], sizes)
        places = torch.from_numpy(np.concatenate([ids for ids, _ in seen]) + starts).to(logits.device)
        counts = torch.from_numpy(np.concatenate([counts for _, counts in seen])).to(logits.device)
        penalties = torch.from_numpy(np.repeat(self._penalties, sizes, axis=0)).to(logits.device)
        repetition, frequency, presence = penalties.unbind(-1)
        flat = logits.view(-1)
        values = flat[places]
        values = torch.where(values > 0, values / repetition, values * repetition)
        flat[places] = values - frequency * counts - presence * (counts > 0)

    def _bind(self, logits: torch.Tensor, stops: Mapping[int, list[int]]) -> None:
        """Leave only what the grammars allow, without `stops` of rows where there is anything else."""
        bound = {row: matcher for row in self._bound if (matcher := self._rows[row].matcher)}
        may = allowed([*bound.values()])[:, : logits.shape[-1]]
        for place, row in enumerate(bound):
            if row in stops:
                longer = may[place].copy()
                longer[[stop for stop in stops[row] if stop < len(longer)]] = False
                may[place] = longer if longer.any() else may[place]
        # a row that cannot go on is left alone: its matcher says why when it is given the token
        may[~may.any(1)] = True
        forbidden = np.zeros(logits.shape, np.bool_)
        forbidden[self._bound, : may.shape[1]] = ~may
        forbidden[self._bound, may.shape[1] :] = True
        logits.masked_fill_(torch.from_numpy(forbidden).to(logits.device), float("-inf"))


class _Shape:
    """How rows that are drawn change their distribution: temperature, min_p, top_k and top_p, each (D, 1)."""

    def __init__(self, rules: Sequence[Sampling], logits: torch.Tensor) -> None:
        vocabulary = logits.shape[-1]
        tops = [min(rule.top_k, vocabulary) if rule.top_k > 0 else vocabulary for rule in rules]

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

        self._scale = column([math.log2(math.e) / max(rule.temperature, COLDEST) for rule in rules])
        self._min_p = column([rule.min_p for rule in rules]) if any(rule.min_p for rule in rules) else None
        # the others need no sorting
        self._cut = [row for row, rule in enumerate(rules) if tops[row] < vocabulary or rule.top_p < 1]
        self._top_k = column([tops[row] for row in self._cut])
        self._top_p = column([rules[row].top_p if rules[row].top_p < 1 else math.inf for row in self._cut])
        self._width = max([NARROW if top == vocabulary else top for top in (tops[row] for row in self._cut)], default=0)

    def draw(self, logits: torch.Tensor, numbers: Sequence[float]) -> list[int]:
        """Invert each row's distribution function at its number from [0, 1). logits: (D, V), used up.

        Weights are probabilities in units of the likeliest token's. Tokens are cut off by their weight and not by
        their rank, so that ties need no order and all rows are alike.
        """
        # by powers of 2, because torch's exp takes a hundred times as long where it underflows
        weights = logits.sub_(logits.amax(-1, keepdim=True)).mul_(self._scale).exp2_()
        if self._min_p is not None:
            weights.masked_fill_(weights < self._min_p, 0.0)
        if self._cut:
            least = torch.zeros_like(self._scale)
            rows = weights if len(self._cut) == len(weights) else weights[self._cut]
            least[self._cut] = _least_kept(rows, self._top_k, self._top_p, self._width)
            weights.masked_fill_(weights < least, 0.0)
        reached = weights.cumsum_(-1)
        target = torch.tensor(numbers, dtype=torch.float32, device=logits.device)[:, None] * reached[:, -1:]
        index = torch.searchsorted(reached, target, right=True)
        # rounding may land it behind the last token that is left in
        last = torch.searchsorted(reached, reached[:, -1:].contiguous())
        picked: list[int] = torch.minimum(index, last)[:, 0].tolist()
        return picked


def _likeliest(logits: torch.Tensor) -> list[int]:
    # torch's argmax on a CPU takes twenty times as long as numpy's
    picked: list[int] = (logits.float().numpy() if logits.is_cpu else logits).argmax(-1).tolist()
    return picked


def _least_kept(weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int) -> torch.Tensor:
    """The lowest weight that `top_k` and then `top_p` leave in each row: (N, 1). weights: (N, V).

    `width` of the largest are sorted, and in rows where these do not reach `top_p`, more.
    """
    vocabulary = weights.shape[-1]
    width = min(width, vocabulary)
    ranked = weights.topk(width, dim=-1).values
    left = ranked.masked_fill(torch.arange(width, device=weights.device) >= top_k, 0.0)
    reached = left.cumsum(-1)
    total = reached[:, -1:]
    if (free := top_k == vocabulary).any():
        total = torch.where(free, weights.sum(-1, keepdim=True), total)
    # the smallest set that reaches top_p: a token stays while those before it do not
    kept = (reached - left < top_p * total).sum(-1, keepdim=True).minimum(top_k.long()).clamp_(1, width)
    least = ranked.gather(-1, kept - 1)
    if width < vocabulary:
        short = (free & (reached[:, -1:] < top_p * total))[:, 0]
        if short.any():
            least[short] = _least_kept(weights[short], top_k[short], top_p[short], 16 * width)
    return least


def _has_penalties(rule: Sampling) -> bool:
    return bool(rule.presence_penalty or rule.frequency_penalty) or rule.repetition_penalty != 1


def _has_rules(generation: Generation) -> bool:
    request, rule = generation.request, generation.request.sampling
    return bool(
        rule.temperature > 0 or rule.logit_bias or request.min_tokens or request.grammar or _has_penalties(rule)
    )
