"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from serve.torch.fused import Part
from serve.torch.layers import Order, Projection
from serve.torch.lora_layer import NOTHING, Gather, Layer, Plan, Scale, Turns, Weights
from serve.torch.stack import Stack

READING, MOVING = 16, 6
"""Reading the weights of a block takes about as long as computing this many rows with them; bringing a row to its block
and its result back, as long as computing this many."""
FEW_ON_CPU, FEW_ELSEWHERE = 8, 3
"""With so many adapters, two products for each take as long as the operations around those by blocks."""
WIDE = 16
"""Tokens in a row from which on the products of a row take much longer than to begin them."""


class Block(NamedTuple):
    """Rows of a batch that have one adapter."""

    adapter: Hashable
    rows: list[int]


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    Where few adapters share a batch, they take turns: two matrix products for each, on the rows that it has. A `Stack`
    is asked to compute its rows in an `order` that gives each adapter one turn.

    Where there are more, their rows are gathered to blocks of one size, and each block has a slot with its adapter's
    weights, so that a batched matrix product computes them all:

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
        self._layers: dict[str, Layer] = {}
        self._slots: list[Hashable] = []
        self._room = 0  # the rank that slots have room for
        self._rows: list[Hashable] = []
        self._width = 1
        self._held: list[Hashable] = []  # those that took turns last
        self._few = FEW_ON_CPU if model.device.type == "cpu" else FEW_ELSEWHERE
        self._orders = isinstance(vars(model).get("forward"), Stack)
        self._adapters: set[Hashable] = set()
        self._touched: set[str] = set()
        self._rank = 0
        self.order: Order | None = None
        """How a `Stack` has to order the rows of the next forward pass."""

    def select(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], first: int = 0, width: int = 1) -> None:
        """Name the adapter of each row of the next forward pass, a key of `pool`; an empty one is the base.

        `first` is where the rows stand among all that run: their slots are there too where that costs nothing, so that
        those that are computed in different steps leave each other's alone. Each row has `width` tokens.
        """
        if rows == self._rows and width == self._width:
            return
        self._rows = []
        adapters = {key for key in rows if key}
        if adapters != self._adapters:
            self._meet([pool[key] for key in adapters])
            self._adapters = adapters
        touched = [layer for layer in self._layers.values() if not self._touched.isdisjoint(layer.parts)]
        order = self._ordered(rows, touched)
        self.order = Order.of(order, self._model.device) if order != [*range(len(rows))] else None
        turns = [(key, len([*same])) for key, same in groupby(rows[row] for row in order)]
        plan: Plan | Turns | None = None
        quick = len(adapters) <= self._few and len(turns) <= 2 * self._few * max(1, width // WIDE)
        if quick or any(pool[key].scales for key in adapters):  # which blocks do not know
            plan = self._turns(turns, pool) if adapters else None
        else:
            plan = self._plan(rows, pool, first)
        for layer in self._layers.values():
            layer.follow(plan if layer in touched else None)
        self._rows, self._width = [*rows], width

    def _ordered(self, rows: Sequence[Hashable], touched: Sequence[Layer]) -> list[int]:
        """The rows so that neighbours have one adapter, where few adapters take turns and the model lets them."""
        if not (self._orders and len(self._adapters) <= self._few and all(layer.in_stack for layer in touched)):
            return [*range(len(rows))]
        places = {key: place for place, key in enumerate(dict.fromkeys(rows))}
        return sorted(range(len(rows)), key=lambda row: places[rows[row]])

    def _turns(self, turns: Sequence[tuple[Hashable, int]], pool: Mapping[Any, Weights]) -> Turns:
        """Let every layer hold the weights of these adapters; the last that had turns stay, in case they come back."""
        now = {key for key, _ in turns if key}
        before = [key for key in self._held if key in pool and key not in now]
        self._held = [*before[-self._few :], *now]
        for layer in self._layers.values():
            layer.hold({key: pool[key] for key in self._held})
        return Turns([key for key, _ in turns], [count for _, count in turns])

    def device(self, name: str) -> torch.device:
        """Where the weights for a layer of the checkpoint belong."""
        layer = self._model.get_submodule(self._path(name))
        found: torch.device = next((t.device for t in (*layer.parameters(), *layer.buffers())), self._model.device)
        return found

    @torch.no_grad()
    def scale(self, name: str, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor) -> Scale:
        """DoRA's gain m / ||W + B A|| of a layer of the checkpoint, over each row of weights, and what keeps its bias.

        a: (rank, in), b: (rank, out), with the scaling, magnitude: (out,). arXiv:2402.09353, equation 5.
        """
        layer: Any = self._model.get_submodule(self._path(name))
        part = self._parts.get(name, Part("", 0, b.shape[1]))
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        weight = weight[part.first : part.last].float()
        changed = torch.addmm(weight, b.T.to(weight), a.to(weight))
        gain = magnitude.to(weight) / torch.linalg.vector_norm(changed, dim=1)
        bias = 0 if layer.bias is None else layer.bias[part.first : part.last]
        return Scale(gain, (1 - gain) * bias)

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
        """The memory of the slots, and of what is held for turns."""
        return sum(layer.bytes for layer in self._layers.values())

    def _meet(self, adapters: Sequence[Weights]) -> None:
        """Note what these adapters need, and hook into layers that none before had weights for."""
        self._rank = max((weights.rank for weights in adapters), default=0)
        self._touched = set().union(*(weights.layers for weights in adapters))
        for name, (a, b) in ((name, pair) for weights in adapters for name, pair in weights.layers.items()):
            path = self._path(name)
            if path not in self._layers:
                parts = {n: p for n, p in self._parts.items() if p.path == path} or {name: Part(path, 0, b.shape[1])}
                layer = self._layers[path] = Layer(parts, a)
                layer.resize(len(self._slots), self._room)
                module = self._model.get_submodule(path)
                if isinstance(module, Projection):
                    module.adapt, layer.in_stack = layer.add, self._orders
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
