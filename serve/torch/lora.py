"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from serve.torch.fused import Part

READING = 16
"""Reading the weights of a block takes about as long as computing this many rows with them."""


@dataclass(frozen=True, eq=False)
class Weights:
    """An adapter in memory: for each linear layer, by its name, A (rank, in) and scaling * B^T (rank, out)."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def rank(self) -> int:
        """The highest of a layer."""
        return max(len(a) for a, _ in self.layers.values())


class Block(NamedTuple):
    """Rows of a batch that have one adapter."""

    adapter: Hashable
    rows: list[int]


class Gather(NamedTuple):
    """Row `source[p]` is computed at place `p`; the result of row `i` is at place `places[i]`.

    Behind the last place are zeros, for the rows of the base. `results` are buffers for all of them, by their width.
    """

    source: torch.Tensor
    places: torch.Tensor
    results: dict[int, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How `batch` rows are computed: in `blocks` blocks of `size` places, block `i` with the weights of slot `i`.

    What is at the places beyond the rows of a block is computed in vain. `gather` is None where rows and places are the
    same.
    """

    batch: int
    blocks: int
    size: int
    rank: int
    gather: Gather | None

    def to(self, device: torch.device) -> Plan:
        """The same on a device."""
        if self.gather is None or self.gather.source.device == device:
            return self
        return replace(self, gather=Gather(self.gather.source.to(device), self.gather.places.to(device), {}))


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    Rows of one adapter are gathered to blocks of one size, and each block has a slot with its adapter's weights, so
    that a batched matrix product computes them all:

        row      0   1   2   3   4        block 0:  1  3      slot 0:  a
        adapter  b   a   -   a   c        block 1:  0  .      slot 1:  b      y[rows] += (x[gather] A^T B^T)[places]
                                          block 2:  4  .      slot 2:  c

    A row's result comes from products of its own, whatever its neighbours ask for. Slots are written only where the
    adapters of a batch change; ranks are padded to the highest in the batch. `model.parts` says which layers of the
    checkpoint are one now (`serve.torch.fused`): their A stand side by side, and each B in columns of its own. Only
    outputs of layers are touched, so the layers may be quantized.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parts: Mapping[str, Part] = model.parts
        self._layers: dict[str, _Layer] = {}
        self._slots: list[Hashable] = []
        self._room = 0  # the rank that slots have room for
        self._rows: list[Hashable] = []
        self._adapters: set[Hashable] = set()
        self._touched: set[str] = set()
        self._rank = 0

    def select(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights]) -> None:
        """Name the adapter of each row of the next forward pass, a key of `pool`; an empty one is the base."""
        if rows == self._rows:
            return
        self._rows = []
        members: dict[Hashable, list[int]] = {}
        for row, key in enumerate(rows):
            if key:
                members.setdefault(key, []).append(row)
        if members.keys() != self._adapters:
            self._meet([pool[key] for key in members])
            self._adapters = set(members)
        plan = self._plan(members, len(rows), pool) if members else None
        for layer in self._layers.values():
            layer.follow(None if self._touched.isdisjoint(layer.parts) else plan)
        self._rows = list(rows)

    def device(self, name: str) -> torch.device:
        """Where the weights for a layer of the checkpoint belong."""
        layer = self._model.get_submodule(self._path(name))
        found: torch.device = next((t.device for t in (*layer.parameters(), *layer.buffers())), self._model.device)
        return found

    @property
    def bytes(self) -> int:
        """The memory that the slots take."""
        return sum(layer.bytes for layer in self._layers.values())

    def _meet(self, adapters: Sequence[Weights]) -> None:
        """Note what these adapters need, and hook into layers that none before had weights for."""
        self._rank = max((weights.rank for weights in adapters), default=0)
        self._touched = set().union(*(weights.layers for weights in adapters))
        for name, (a, b) in ((name, pair) for weights in adapters for name, pair in weights.layers.items()):
            path = self._path(name)
            if path not in self._layers:
                parts = {n: p for n, p in self._parts.items() if p.path == path} or {name: Part(path, 0, b.shape[1])}
                layer = self._layers[path] = _Layer(parts, a)
                layer.resize(len(self._slots), self._room)
                self._model.get_submodule(path).register_forward_hook(layer)

    def _path(self, name: str) -> str:
        return self._parts[name].path if name in self._parts else name

    def _plan(self, members: Mapping[Hashable, list[int]], batch: int, pool: Mapping[Any, Weights]) -> Plan:
        size, blocks = arrange(members)
        if len(blocks) > len(self._slots) or self._rank > self._room:
            self._room = max(self._rank, self._room)
            self._slots = [None] * max(-(-len(blocks) // 8) * 8, len(self._slots))
            for layer in self._layers.values():
                layer.resize(len(self._slots), self._room)
        blocks = self._fill(blocks, pool)
        source = [row for block in blocks for row in block.rows + block.rows[:1] * (size - len(block.rows))]
        if source == list(range(batch)):
            return Plan(batch, len(blocks), size, self._rank, None)
        places = [len(blocks) * size] * batch  # where nothing but zeros is
        for i, block in enumerate(blocks):
            for j, row in enumerate(block.rows):
                places[row] = i * size + j
        return Plan(batch, len(blocks), size, self._rank, Gather(torch.tensor(source), torch.tensor(places), {}))

    def _fill(self, blocks: list[Block], pool: Mapping[Any, Weights]) -> list[Block]:
        """The blocks in the order of their slots, the first ones. What one of them holds already is not written."""
        missing: dict[Hashable, list[Block]] = {}
        for block in blocks:
            missing.setdefault(block.adapter, []).append(block)
        held = [missing[key].pop(0) if missing.get(key) else None for key in self._slots[: len(blocks)]]
        rest = iter([block for left in missing.values() for block in left])
        placed = [block or next(rest) for block in held]
        for slot, block in enumerate(placed):
            if held[slot] is None:
                self._slots[slot] = None  # until all of it is written
                for layer in self._layers.values():
                    layer.write(slot, pool[block.adapter])
                self._slots[slot] = block.adapter
        return placed


class _Layer:
    """The slots of one linear layer, (S, R, P, in) and (S, R, P, out) for S slots, ranks up to R and P parts."""

    def __init__(self, parts: Mapping[str, Part], like: torch.Tensor) -> None:
        self.parts = parts
        self._outputs = max(part.last for part in parts.values())
        self._a = like.new_empty(0, 0, len(parts), like.shape[1])
        self._b = like.new_empty(0, 0, len(parts), self._outputs)
        self._plan: Plan | None = None
        self._shape = (0, 0)

    @property
    def bytes(self) -> int:
        """The memory that they take."""
        return self._a.nbytes + self._b.nbytes

    def resize(self, slots: int, rank: int) -> None:
        """Make room; all slots are zero afterwards."""
        self._shape = (0, 0)
        self._a = self._a.new_zeros(slots, rank, *self._a.shape[2:])
        self._b = self._b.new_zeros(slots, rank, *self._b.shape[2:])

    def write(self, slot: int, weights: Weights) -> None:
        """Put an adapter's weights into a slot, zeros where it has none."""
        for index, (name, part) in enumerate(self.parts.items()):
            a, b = self._a[slot, :, index], self._b[slot, :, index, part.first : part.last]
            rank = 0
            if name in weights.layers:
                rank = len(weights.layers[name][0])
                a[:rank], b[:rank] = weights.layers[name]
            if rank < len(a):
                a[rank:], b[rank:] = 0, 0

    def follow(self, plan: Plan | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
        self._plan = plan and plan.to(self._a.device)
        if plan is not None and (plan.blocks, plan.rank) != self._shape:
            self._shape = plan.blocks, plan.rank
            self._a_t = self._a[: plan.blocks, : plan.rank].flatten(1, 2).transpose(1, 2)  # (blocks, in, R * P)
            self._b_t = self._b[: plan.blocks, : plan.rank].flatten(1, 2)  # (blocks, R * P, out)

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        """The hook. Inputs and outputs are (B, Q, ...), or (B * Q, ...) as a mixture of experts flattens them."""
        plan = self._plan
        if plan is None:
            return None
        x, gather = inputs[0].to(self._a.dtype), plan.gather
        if gather is None:
            low = x.reshape(plan.blocks, -1, x.shape[-1]) @ self._a_t
            output.view(plan.blocks, -1, self._outputs).baddbmm_(low, self._b_t)
            return output
        x = x.reshape(plan.batch, -1).index_select(0, gather.source).view(plan.blocks, -1, x.shape[-1])
        width = output.numel() // plan.batch
        found = gather.results.get(width)
        if found is None:
            found = gather.results[width] = self._b.new_zeros(plan.blocks * plan.size + 1, width)
        torch.bmm(x @ self._a_t, self._b_t, out=found[:-1].view(plan.blocks, -1, self._outputs))
        return output.add_(found.index_select(0, gather.places).view_as(output))


def arrange(members: Mapping[Hashable, list[int]]) -> tuple[int, list[Block]]:
    """The size of the blocks that costs least, and the blocks; `members` are the rows of each adapter."""
    longest = max(map(len, members.values()))
    sizes = [longest, *(1 << i for i in range(longest.bit_length()))]

    def cost(size: int) -> int:
        return sum(-(-len(rows) // size) for rows in members.values()) * (size + READING)

    size = min(sizes, key=cost)
    return size, [Block(key, rows[i : i + size]) for key, rows in members.items() for i in range(0, len(rows), size)]
