"""One linear layer and the adapters of the rows that it computes: the weights at hand, and the products."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
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


NOTHING = Weights({})
"""What the base adds to itself."""


class Pair(NamedTuple):
    """What an adapter adds to a layer's output for x (N, in): x `a` (in, R) `b` (R, out)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: Scale | None = None
    """What it does to that output before."""


@dataclass(frozen=True)
class Turns:
    """So many rows of one adapter ("" is the base), then so many of the next."""

    adapters: list[Hashable]
    counts: list[int]


class Gather:
    """Row `source[p]` is computed at place `p`; the result of row `i` is at place `places[i]`.

    There are `size` places in each block. Behind the last one are zeros, for the rows of the base.
    """

    def __init__(self, size: int, source: torch.Tensor, places: torch.Tensor) -> None:
        self._size, self._source, self._places = size, source, places
        self._sources: dict[int, torch.Tensor] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._results: dict[tuple[int, int], torch.Tensor] = {}
        self._on = {source.device: self}

    def source(self, parts: int) -> torch.Tensor:
        """The rows to compute, (blocks * parts * size,), each block once for every part."""
        if parts not in self._sources:
            self._sources[parts] = self._source.view(-1, 1, self._size).expand(-1, parts, -1).flatten()
        return self._sources[parts]

    def places(self, units: int) -> torch.Tensor:
        """Where the results of the rows are, (B * units,), among those of all blocks: (blocks, units, size)."""
        if units not in self._targets:
            block, place = self._places[:, None] // self._size, self._places[:, None] % self._size
            unit = torch.arange(units, device=block.device).where(self._places[:, None] < len(self._source), 0)
            self._targets[units] = ((block * units + unit) * self._size + place).flatten()
        return self._targets[units]

    def results(self, units: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer for all results, (places * units + 1, width); the last row is zero."""
        if (units, width) not in self._results:
            self._results[units, width] = like.new_zeros(len(self._source) * units + 1, width)
        return self._results[units, width]

    def to(self, device: torch.device) -> Gather:
        """The same on a device."""
        if device not in self._on:
            self._on[device] = Gather(self._size, self._source.to(device), self._places.to(device))
        return self._on[device]


@dataclass(frozen=True)
class Plan:
    """How `batch` rows are computed: in `blocks` blocks of equal size, with the weights of slots from `first` on.

    What is at the places beyond the rows of a block is computed in vain. `gather` is None where rows and places are the
    same.
    """

    batch: int
    first: int
    blocks: int
    rank: int
    gather: Gather | None

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        return replace(self, gather=self.gather and self.gather.to(device))


class Layer:
    """The slots of one linear layer: A (S, P, R, in) and B^T (S, U, R, out / U), for S slots, P parts, ranks up to R.

    What the parts put out side by side is cut into U units of the largest width that divides all of theirs.
    """

    def __init__(self, parts: Mapping[str, Part], like: torch.Tensor) -> None:
        self.parts = parts
        self._width = math.gcd(*(part.last - part.first for part in parts.values()))
        self._places = [(part.first // self._width, part.last // self._width) for part in parts.values()]
        self._units = max(last for _, last in self._places)
        of_units = [index for index, (first, last) in enumerate(self._places) for _ in range(first, last)]
        self._of_units = torch.tensor(of_units, device=like.device)
        self._a = like.new_empty(0, len(parts), 0, like.shape[1])
        self._b = like.new_empty(0, self._units, 0, self._width)
        self._slots: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._plan: Plan | None = None
        self._shape = (0, 0, 0)
        self._held: dict[Hashable, Pair | None] = {}
        self._turns: list[Pair | None] = []
        self._counts: list[int] = []
        self.in_stack = False
        """Whether it is computed where a `Stack` has ordered the rows."""

    @property
    def bytes(self) -> int:
        """The memory that they take, and what is held for turns."""
        return self._a.nbytes + self._b.nbytes + sum(t.nbytes for pair in self._held.values() for t in (pair or ())[:2])

    def resize(self, slots: int, rank: int) -> None:
        """Make room; all slots are zero afterwards."""
        self._shape = (0, 0, 0)
        self._a = self._a.new_zeros(slots, len(self.parts), rank, self._a.shape[3])
        self._b = self._b.new_zeros(slots, self._units, rank, self._width)
        self._slots = [
            [(a[index], b[first:last].transpose(0, 1)) for index, (first, last) in enumerate(self._places)]
            for a, b in zip(self._a, self._b, strict=True)
        ]

    def write(self, slot: int, weights: Weights) -> None:
        """Put an adapter's weights into a slot, zeros where it has none."""
        for name, (a, b) in zip(self.parts, self._slots[slot], strict=True):
            rank = 0
            if name in weights.layers:
                low, high = weights.layers[name]
                rank = len(low)
                a[:rank], b[:rank] = low, high.view(rank, -1, self._width)
            if rank < len(a):
                a[rank:], b[rank:] = 0, 0

    def hold(self, adapters: Mapping[Hashable, Weights]) -> None:
        """Keep the weights of these adapters for turns, and of no others."""
        if (known := self._held).keys() == adapters.keys():
            return
        self._held = {key: known[key] if key in known else self._pair(weights) for key, weights in adapters.items()}

    def _pair(self, weights: Weights) -> Pair | None:
        """A^T (in, R) and B^T (R, out) of all parts together, for the sum R of their ranks."""
        found = [(*weights.layers[name], part) for name, part in self.parts.items() if name in weights.layers]
        if not found:
            return None
        if len(self.parts) == 1:
            (name,) = self.parts
            return Pair(found[0][0].T, found[0][1], weights.scales.get(name))
        a = torch.cat([low for low, _, _ in found])
        b = a.new_zeros(len(a), self._units * self._width)
        rank = 0
        for _, high, part in found:
            b[rank : rank + len(high), part.first : part.last] = high
            rank += len(high)
        scale = Scale(*torch.tensor([[1.0], [0.0]], device=a.device).repeat(1, b.shape[1]))
        for name in (scaled := self.parts.keys() & weights.scales.keys()):
            for whole, given in zip(scale, weights.scales[name], strict=True):
                whole[self.parts[name].first : self.parts[name].last] = given
        return Pair(a.T, b, scale if scaled else None)

    def follow(self, plan: Plan | Turns | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
        self._counts = []
        if isinstance(plan, Turns):
            self._turns = [self._held.get(key) for key in plan.adapters]
            self._plan, self._counts = None, plan.counts
            return
        self._plan = plan and plan.to(self._a.device)
        if plan is not None and (plan.first, plan.blocks, plan.rank) != self._shape:
            self._shape = plan.first, plan.blocks, plan.rank
            slots = slice(plan.first, plan.first + plan.blocks)
            self._a_t = self._a[slots, :, : plan.rank].flatten(0, 1).transpose(1, 2)  # (blocks * P, in, R)
            self._b_t = self._b[slots, :, : plan.rank].flatten(0, 1)  # (blocks * U, R, out / U)

    def hook(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """What `nn.Module.register_forward_hook` takes."""
        self.add(inputs[0], output)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """To the output for `x`. They are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            if self._counts:
                self._take_turns(x, output)
            return
        gather, parts, units, size = plan.gather, len(self.parts), self._units, x.shape[-1]
        x = x.to(self._a.dtype)
        if gather is not None:
            x = x.reshape(plan.batch, -1).index_select(0, gather.source(parts))
        elif parts > 1:
            x = x.reshape(plan.blocks, 1, -1).expand(-1, parts, -1)
        low = torch.bmm(x.reshape(plan.blocks * parts, -1, size), self._a_t)  # (blocks * P, N, R)
        if units > parts:
            low = low.view(plan.blocks, parts, -1).index_select(1, self._of_units)
            low = low.view(plan.blocks * units, -1, plan.rank)
        rows = plan.batch if gather is not None else plan.blocks
        output_by_unit = output.view(rows, -1, units, self._width).transpose(1, 2)  # (B, U, Q, out / U)
        if gather is not None:
            results = gather.results(units, output.numel() // (rows * units), self._b)
            torch.bmm(low, self._b_t, out=results[:-1].view(plan.blocks * units, -1, self._width))
            output_by_unit += results.index_select(0, gather.places(units)).view_as(output_by_unit)
        elif units == 1 or low.shape[1] == 1:
            output.view(plan.blocks * units, -1, self._width).baddbmm_(low, self._b_t)
        else:
            output_by_unit += torch.bmm(low, self._b_t).view_as(output_by_unit)

    def _take_turns(self, x: torch.Tensor, output: torch.Tensor) -> None:
        x, output = x.to(self._a.dtype).flatten(0, -2), output.view(-1, output.shape[-1])
        width = len(x) // sum(self._counts)
        sizes = self._counts if width == 1 else [count * width for count in self._counts]
        turns = zip(self._turns, x.split_with_sizes(sizes), output.split_with_sizes(sizes), strict=True)
        for pair, inputs, outputs in turns:
            if pair is not None:
                if pair.scale is not None:
                    outputs.mul_(pair.scale.gain).add_(pair.scale.shift)
                outputs.addmm_(inputs.mm(pair.a), pair.b)
