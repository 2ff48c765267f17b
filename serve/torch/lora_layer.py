"""One linear layer and the adapters of the rows that it computes: the weights at hand, and the products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import nn

from serve.torch.fused import Part


class Scale(NamedTuple):
    """What DoRA does to the output of a layer of the base: y `gain` + `shift`, both (out,), in float32."""

    gain: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """An adapter in memory: for each linear layer, by its name, A (rank, in) and scaling * B^T (rank, out).

    With DoRA (arXiv:2402.09353) B has the gain of `scales` in it already.
    """

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    scales: Mapping[str, Scale] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        """The highest of a layer."""
        return max((len(a) for a, _ in self.layers.values()), default=0)

    @cached_property
    def size(self) -> int:
        """How many numbers its layers have."""
        return sum(a.numel() + b.numel() for a, b in self.layers.values())


NOTHING = Weights({})
"""What the base adds to itself."""


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
    """How `batch` rows are computed: in `blocks` blocks of equal `size`, with the weights of the slots from `first` on.

    Without a `gather` the blocks are the first rows, and those behind them have the base.
    """

    batch: int
    blocks: int
    size: int
    rank: int
    first: int = 0
    gather: Gather | None = None

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        return replace(self, gather=self.gather and self.gather.to(device))


class Layer:
    """The slots of one linear layer: A (S, R, P, in) and B^T (S, R, P, out), for S slots, ranks up to R and P parts.

    B of a part is zero outside of the columns that are the part's, so that one product serves them all. Where each row
    of a batch reads a B of its own, the time goes into reading: so B of several parts is there once more in U units of
    W columns, (S, U, R, W), without those zeros.
    """

    def __init__(self, parts: Mapping[str, Part], like: torch.Tensor) -> None:
        self.parts = parts
        self._inputs, self._outputs = like.shape[1], max(part.last for part in parts.values())
        self._unit = math.gcd(*(part.first for part in parts.values()), *(part.last for part in parts.values()))
        starts = range(0, self._outputs, self._unit) if len(parts) > 1 else ()
        of = [index for start in starts for index, part in enumerate(parts.values()) if part.first <= start < part.last]
        self._part_of = torch.tensor(of, dtype=torch.long, device=like.device)  # (U,)
        self._a = like.new_empty(0, 0, len(parts), self._inputs)
        self._b = like.new_empty(0, 0, len(parts), self._outputs)
        self._units = like.new_empty(0, len(of), 0, self._unit)
        self._views: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        self._plan: Plan | Turns | None = None
        self._shape = (0, 0, 0)
        self.bytes = (len(parts) * (self._inputs + self._outputs) + len(of) * self._unit) * like.itemsize
        """The memory that a slot takes, for each rank."""
        self.in_stack = False
        """Whether it is computed where a `Stack` orders the rows."""

    def resize(self, slots: int, rank: int) -> None:
        """Make room; what the first slots hold stays where the rank does, others are zero."""
        self._shape = (0, 0, 0)
        self._views.clear()
        self._a_t = self._b_t = self._units_t = self._a.new_empty(0)  # views too: they would keep what is replaced
        self._a = _resized(self._a, slots, rank, *self._a.shape[2:])
        self._b = _resized(self._b, slots, rank, *self._b.shape[2:])
        self._units = _resized(self._units, slots, len(self._part_of), rank, self._unit)

    def copies(self, slot: int, weights: Weights) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs of target and source: once copied, a slot has an adapter's weights, and zeros where that has none."""
        if slot not in self._views:  # making them takes as long as copying
            a, b, units = self._a[slot], self._b[slot], self._units[slot].transpose(0, 1)  # (R, U, W)
            self._views[slot] = [
                (
                    a[:, index],
                    b[:, index, part.first : part.last],
                    units[:, part.first // self._unit : part.last // self._unit],
                )
                for index, part in enumerate(self.parts.values())
            ]
        for name, (a, b, units) in zip(self.parts, self._views[slot], strict=True):
            low, high = weights.layers.get(name) or (a[:0], b[:0])
            if (rank := len(low)) < len(a):
                for target in (a, b, units):
                    target[rank:] = 0
                a, b, units = a[:rank], b[:rank], units[:rank]
            yield from ((a, low), (b, high))
            if len(self.parts) > 1:
                yield units, high.view(units.shape)

    def follow(self, plan: Plan | Turns | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
        if not isinstance(plan, Plan):
            self._plan = plan
            return
        self._plan = plan.to(self._a.device)
        if (plan.first, plan.blocks, plan.rank) != self._shape:
            self._shape = plan.first, plan.blocks, plan.rank
            slots = slice(plan.first, plan.first + plan.blocks)
            self._a_t = self._a[slots, : plan.rank].flatten(1, 2).transpose(1, 2)  # (blocks, in, R P)
            self._b_t = self._b[slots, : plan.rank].flatten(1, 2)  # (blocks, R P, out)
            self._units_t = self._units[slots, :, : plan.rank].flatten(0, 1)  # (blocks U, R, W)

    def hook(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """What `nn.Module.register_forward_hook` takes."""
        self.add(inputs[0], output)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """To the output for `x`. They are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            return
        if x.dtype != self._a.dtype:
            x = x.to(self._a.dtype)
        if isinstance(plan, Turns):
            self._take_turns(plan, x.reshape(-1, self._inputs), output.view(-1, self._outputs))
        elif plan.gather is not None:
            self._gather(plan, plan.gather, x, output)
        else:
            rows = x.numel() // (self._inputs * plan.batch) * plan.size  # of a block, one for each token
            low = torch.bmm(_blocks(x.contiguous(), plan.blocks, rows, self._inputs), self._a_t)  # (blocks, N, R P)
            if rows == 1 < len(self.parts):
                low = low.view(plan.blocks, plan.rank, -1).transpose(1, 2).index_select(1, self._part_of)
                low = low.view(-1, 1, plan.rank)  # (blocks U, 1, R)
                _blocks(output, len(low), 1, self._unit).baddbmm_(low, self._units_t)
            else:
                _blocks(output, plan.blocks, rows, self._outputs).baddbmm_(low, self._b_t)

    def _gather(self, plan: Plan, gather: Gather, x: torch.Tensor, output: torch.Tensor) -> None:
        x = x.reshape(plan.batch, -1).index_select(0, gather.source)
        low = torch.bmm(x.view(plan.blocks, -1, self._inputs), self._a_t)
        results = gather.results(output.numel() // plan.batch, self._b)
        torch.bmm(low, self._b_t, out=results[:-1].view(plan.blocks, -1, self._outputs))
        output += results.index_select(0, gather.places).view_as(output)

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


def _blocks(x: torch.Tensor, blocks: int, rows: int, size: int) -> torch.Tensor:
    """The first numbers of `x`, contiguous, as (blocks, rows, size): one operation where views would be three."""
    assert x.is_contiguous()
    return x.as_strided((blocks, rows, size), (rows * size, size, 1))


def _resized(slots: torch.Tensor, *shape: int) -> torch.Tensor:
    new = slots.new_zeros(shape)
    if new.shape[1:] == slots.shape[1:]:
        kept = slots[: len(new)]
        new[: len(kept)] = kept
    return new
