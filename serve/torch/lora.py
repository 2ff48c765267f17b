"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from serve.torch.fused import Part
from serve.torch.layers import Projection

READING, MOVING = 16, 6
"""Reading the weights of a block takes about as long as computing this many rows with them; bringing a row to its block
and its result back, as long as computing this many."""


@dataclass(frozen=True, eq=False)
class Weights:
    """An adapter in memory: for each linear layer, by its name, A (rank, in) and scaling * B^T (rank, out)."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def rank(self) -> int:
        """The highest of a layer."""
        return max((len(a) for a, _ in self.layers.values()), default=0)


NOTHING = Weights({})
"""What the base adds to itself."""


class Block(NamedTuple):
    """Rows of a batch that have one adapter."""

    adapter: Hashable
    rows: list[int]


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


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    Where few adapters share a batch, their rows are gathered to blocks of one size, and each block has a slot with its
    adapter's weights, so that a batched matrix product computes them all:

        row      0   1   2   3   4        block 0:  1  3      slot 0:  a
        adapter  b   a   -   a   c        block 1:  0  .      slot 1:  b      y[rows] += (x[gather] A^T B^T)[places]
                                          block 2:  4  .      slot 2:  c

    Where most rows have an adapter of their own, each row is a block, and nothing is gathered.

    A row's result comes from products of its own, whatever its neighbours ask for. Slots are written only where the
    adapters of a batch change; ranks are padded to the highest in the batch. `model.parts` says which layers of the
    checkpoint are one now (`serve.torch.fused`): their A stand side by side, and each B in units of its own. Only
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

    def select(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], first: int = 0) -> None:
        """Name the adapter of each row of the next forward pass, a key of `pool`; an empty one is the base.

        `first` is where the rows stand among all that take turns: their slots are there too where that costs nothing,
        so that those who take turns leave each other's alone.
        """
        if rows == self._rows:
            return
        self._rows = []
        adapters = {key for key in rows if key}
        if adapters != self._adapters:
            self._meet([pool[key] for key in adapters])
            self._adapters = adapters
        plan = self._plan(rows, pool, first) if adapters else None
        for layer in self._layers.values():
            layer.follow(None if self._touched.isdisjoint(layer.parts) else plan)
        self._rows = list(rows)

    def device(self, name: str) -> torch.device:
        """Where the weights for a layer of the checkpoint belong."""
        layer = self._model.get_submodule(self._path(name))
        found: torch.device = next((t.device for t in (*layer.parameters(), *layer.buffers())), self._model.device)
        return found

    def shape(self, name: str) -> tuple[int, int] | None:
        """How many values a layer of the checkpoint puts out, and takes, however its weight is packed.

        None where it does not say.
        """
        layer: Any = self._model.get_submodule(self._path(name))
        part = self._parts.get(name)
        outputs = part.last - part.first if part else getattr(layer, "out_features", None)
        return (outputs, layer.in_features) if outputs else None

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
                module = self._model.get_submodule(path)
                if isinstance(module, Projection):
                    module.adapt = layer.add
                else:
                    module.register_forward_hook(layer.hook)

    def _path(self, name: str) -> str:
        return self._parts[name].path if name in self._parts else name

    def _plan(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], first: int) -> Plan:
        size, blocks = arrange(rows)
        batch, count = len(rows), len(blocks)
        if count > len(self._slots) or self._rank > self._room:
            self._room = max(self._rank, self._room)
            self._slots = [None] * max(-(-count // 8) * 8, len(self._slots))
            for layer in self._layers.values():
                layer.resize(len(self._slots), self._room)
        if [row for block in blocks for row in block.rows] == [*range(batch)] and size * count == batch:
            first = min(first, len(self._slots) - count)
            self._fill(first, blocks, pool)
            return Plan(batch, first, count, self._rank, None)
        blocks = self._matched(blocks)
        self._fill(0, blocks, pool)
        source = [row for block in blocks for row in block.rows + block.rows[:1] * (size - len(block.rows))]
        places = [count * size] * batch  # where nothing but zeros is
        for i, block in enumerate(blocks):
            for j, row in enumerate(block.rows):
                places[row] = i * size + j
        return Plan(batch, 0, count, self._rank, Gather(size, torch.tensor(source), torch.tensor(places)))

    def _matched(self, blocks: list[Block]) -> list[Block]:
        """The blocks in another order: what the first slots hold of them stays where it is."""
        missing: dict[Hashable, list[Block]] = {}
        for block in blocks:
            missing.setdefault(block.adapter, []).append(block)
        held = [missing[key].pop(0) if missing.get(key) else None for key in self._slots[: len(blocks)]]
        rest = iter([block for left in missing.values() for block in left])
        return [block or next(rest) for block in held]

    def _fill(self, first: int, blocks: list[Block], pool: Mapping[Any, Weights]) -> None:
        """Give the slots from `first` on the weights of the blocks, where they have others."""
        for slot, block in enumerate(blocks, first):
            if self._slots[slot] != block.adapter:
                self._slots[slot] = None  # until all of it is written
                for layer in self._layers.values():
                    layer.write(slot, pool[block.adapter] if block.adapter else NOTHING)
                self._slots[slot] = block.adapter


class _Layer:
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

    @property
    def bytes(self) -> int:
        """The memory that they take."""
        return self._a.nbytes + self._b.nbytes

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

    def follow(self, plan: Plan | None) -> None:
        """Compute the next forward passes by `plan`; with None, leave the layer's output as it is."""
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


def arrange(rows: Sequence[Hashable]) -> tuple[int, list[Block]]:
    """The size of the blocks that costs least, and the blocks; `rows` are the adapters of the rows, empty for the base.

    With a block for each row, in their order, the base's are among them.
    """
    members: dict[Hashable, list[int]] = {}
    for row, key in enumerate(rows):
        if key:
            members.setdefault(key, []).append(row)
    longest = max(map(len, members.values()))
    sizes = [longest, *(1 << i for i in range(longest.bit_length()))]

    def cost(size: int) -> int:
        blocks = sum(-(-len(rows) // size) for rows in members.values())
        return blocks * (size * (1 + MOVING) + READING)

    size = min(sizes, key=cost)
    if len(rows) * (1 + READING) <= cost(size):
        return 1, [Block(key, [row]) for row, key in enumerate(rows)]
    return size, [Block(key, rows[i : i + size]) for key, rows in members.items() for i in range(0, len(rows), size)]
