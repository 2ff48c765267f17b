"""One linear layer and the adapters of the rows that it computes: the weights at hand, and the products."""

from __future__ import annotations

from collections.abc import Mapping
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
    """How `batch` rows are computed: in `blocks` blocks of equal `size`, with the weights of the first slots.

    Without a `gather` the blocks are the first rows, and those behind them have the base.
    """

    batch: int
    blocks: int
    size: int
    rank: int
    gather: Gather | None = None

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        return replace(self, gather=self.gather and self.gather.to(device))


class Layer:
    """The slots of one linear layer: A (S, R, P, in) and B^T (S, R, P, out), for S slots, ranks up to R and P parts.

    B of a part is zero outside of the columns that are the part's, so that one product serves them all.
    """

    def __init__(self, parts: Mapping[str, Part], like: torch.Tensor) -> None:
        self.parts = parts
        self._inputs, self._outputs = like.shape[1], max(part.last for part in parts.values())
        self._a = like.new_empty(0, 0, len(parts), self._inputs)
        self._b = like.new_empty(0, 0, len(parts), self._outputs)
        self._plan: Plan | Turns | None = None
        self._shape = (0, 0)
        self.bytes = len(parts) * (self._inputs + self._outputs) * like.itemsize
        """The memory that a slot takes, for each rank."""
        self.in_stack = False
        """Whether it is computed where a `Stack` orders the rows."""

    def resize(self, slots: int, rank: int) -> None:
        """Make room; all slots are zero afterwards."""
        self._shape = (0, 0)
        self._a = self._a.new_zeros(slots, rank, *self._a.shape[2:])
        self._b = self._b.new_zeros(slots, rank, *self._b.shape[2:])

    def write(self, slot: int, weights: Weights) -> None:
        """Put an adapter's weights into a slot, zeros where it has none."""
        a, b = self._a[slot].zero_(), self._b[slot].zero_()
        for index, (name, part) in enumerate(self.parts.items()):
            if name in weights.layers:
                low, high = weights.layers[name]
                a[: len(low), index], b[: len(low), index, part.first : part.last] = low, high

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

    def hook(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """What `nn.Module.register_forward_hook` takes."""
        self.add(inputs[0], output)

    def add(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """To the output for `x`. They are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            return
        x, output = x.to(self._a.dtype).reshape(-1, self._inputs), output.view(-1, self._outputs)
        if isinstance(plan, Turns):
            self._take_turns(plan, x, output)
        elif plan.gather is not None:
            self._gather(plan, plan.gather, x, output)
        else:
            if plan.blocks * plan.size < plan.batch:
                adapted = len(x) // plan.batch * plan.blocks * plan.size
                x, output = x[:adapted], output[:adapted]
            low = torch.bmm(x.view(plan.blocks, -1, self._inputs), self._a_t)  # (blocks, N, R P)
            output.view(plan.blocks, -1, self._outputs).baddbmm_(low, self._b_t)

    def _gather(self, plan: Plan, gather: Gather, x: torch.Tensor, output: torch.Tensor) -> None:
        x = x.view(plan.batch, -1).index_select(0, gather.source)
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
