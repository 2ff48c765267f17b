"""One linear layer and the adapters of the rows that it computes, as batched products of matrices, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from serve.torch.fused import Part
from serve.torch.low_rank import Weights


@dataclass(frozen=True)
class Turns:
    """So many rows of one adapter (`NOTHING` is the base's), then so many of the next."""

    adapters: list[Weights]
    counts: list[int]


class Gather:
    """Row `source[p]` is computed at place `p`; the result of row `i` is at place `places[i]`.

    Behind the last place are zeros, for the rows of the base.
    """

    def __init__(self, source: torch.Tensor, places: torch.Tensor) -> None:
        self.source, self.places = source, places
        self._results: dict[int, torch.Tensor] = {}
        self._on = {source.device: self}

    def results(self, width: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer for all results, (places + 1, width); the last row is zero."""
        if width not in self._results:
            self._results[width] = like.new_zeros(len(self.source) + 1, width)
        return self._results[width]

    def to(self, device: torch.device) -> Gather:
        """The same on a device."""
        if device not in self._on:
            self._on[device] = Gather(self.source.to(device), self.places.to(device))
        return self._on[device]


@dataclass(frozen=True)
class Plan:
    """How `batch` rows are computed: those that have an adapter in `blocks` blocks, with the weights of that slot."""

    batch: int
    blocks: int
    rank: int
    gather: Gather

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        return replace(self, gather=self.gather.to(device))


class Layer:
    """The slots of one linear layer: A (S, R, P, in) and B^T (S, R, P, out), for S slots, ranks up to R and P parts.

    B of a part is zero outside of the columns that are the part's, so that one product serves them all.
    """

    def __init__(self, parts: Mapping[str, Part], like: torch.Tensor) -> None:
        self.parts = parts
        self._inputs, self._outputs = like.shape[1], max(part.last for part in parts.values())
        self._a = like.new_empty(0, 0, len(parts), self._inputs)
        self._b = like.new_empty(0, 0, len(parts), self._outputs)
        self._views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._plan: Plan | Turns | None = None
        self._shape = (0, 0)
        self.bytes = len(parts) * (self._inputs + self._outputs) * like.itemsize
        """The memory that a slot takes, for each rank."""

    def resize(self, slots: int, rank: int) -> None:
        """Make room; what the first slots hold stays where the rank does, others are zero."""
        self._shape = (0, 0)
        self._views.clear()
        self._a_t = self._b_t = self._a.new_empty(0)  # views too: they would keep what is replaced
        self._a = _resized(self._a, slots, rank, *self._a.shape[2:])
        self._b = _resized(self._b, slots, rank, *self._b.shape[2:])

    def copies(self, slot: int, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of target and source: once copied, a slot has an adapter's weights, and zeros where that has none."""
        if slot not in self._views:  # making them takes as long as copying
            a, b = self._a[slot], self._b[slot]
            self._views[slot] = [
                (a[:, index], b[:, index, part.first : part.last]) for index, part in enumerate(self.parts.values())
            ]
        for name, (a, b) in zip(self.parts, self._views[slot], strict=True):
            low, high = weights.layers.get(name) or (a[:0], b[:0])
            if (rank := len(low)) < len(a):
                a[rank:] = 0
                b[rank:] = 0
            yield from ((a[:rank], low), (b[:rank], high))

    def follow(self, plan: Plan | Turns | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
        if not isinstance(plan, Plan):
            self._plan = plan
            return
        self._plan = plan.to(self._a.device)
        if (plan.blocks, plan.rank) != self._shape:
            self._shape = plan.blocks, plan.rank
            self._a_t = self._a[: plan.blocks, : plan.rank].flatten(1, 2).transpose(1, 2)  # (blocks, in, R P)
            self._b_t = self._b[: plan.blocks, : plan.rank].flatten(1, 2)  # (blocks, R P, out)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """To the output for `x`. They are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            return
        if x.dtype != self._a.dtype:
            x = x.to(self._a.dtype)
        if isinstance(plan, Turns):
            self._take_turns(plan, x.reshape(-1, self._inputs), output.view(-1, self._outputs))
            return
        x = x.reshape(plan.batch, -1).index_select(0, plan.gather.source)
        low = torch.bmm(x.view(plan.blocks, -1, self._inputs), self._a_t)
        results = plan.gather.results(output.numel() // plan.batch, self._b)
        torch.bmm(low, self._b_t, out=results[:-1].view(plan.blocks, -1, self._outputs))
        output += results.index_select(0, plan.gather.places).view_as(output)

    def at(self, x: torch.Tensor, output: torch.Tensor) -> Callable[[], object]:
        """What does so again and again."""
        return partial(self.add, x, output)

    def _take_turns(self, turns: Turns, x: torch.Tensor, output: torch.Tensor) -> None:
        width = len(x) // sum(turns.counts)
        sizes = [count * width for count in turns.counts]
        rows = zip(turns.adapters, x.split_with_sizes(sizes), output.split_with_sizes(sizes), strict=True)
        for weights, inputs, outputs in rows:
            for name, part in self.parts.items():
                if name not in weights.layers:
                    continue
                low, high = weights.layers[name]
                own = outputs if len(self.parts) == 1 else outputs[:, part.first : part.last]
                if name in weights.scales:
                    gain, shift = weights.scales[name]
                    own.mul_(gain).add_(shift)
                own.addmm_(inputs.mm(low.T), high)


def _resized(slots: torch.Tensor, *shape: int) -> torch.Tensor:
    new = slots.new_zeros(shape)
    if new.shape[1:] == slots.shape[1:]:
        kept = slots[: len(new)]
        new[: len(kept)] = kept
    return new
