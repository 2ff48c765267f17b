"""Many LoRA adapters in one forward pass: rows of the base and of any adapters mixed in a batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Set
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
SLOTS = 8
"""Above so many slots, so many come at a time."""
COPIES = 4
"""Slots may take so many times the memory that adapters may: rows of one adapter may each have a slot."""
FEW = 8
"""Turns that are quickly begun, where a row has few tokens."""
WIDE = 16
"""Tokens in a row from which on the products of a row take much longer than to begin them."""


class Block(NamedTuple):
    """Rows of a batch that have one adapter."""

    adapter: Hashable
    rows: list[int]


class MultiLora:
    """Adds `x A^T B^T * scaling` of each row's adapter to the output of every adapted linear layer.

    Where a token is computed for each row, rows of one adapter are blocks of one size, and each block has a slot with
    its adapter's weights, so that two batched matrix products compute them all. A `Stack` is asked to compute its rows
    in the `order` of the blocks, some of them twice where a block is not full, and the base's behind them:

        row      0   1   2   3   4        block 0:  1  3      slot 0:  a
        adapter  b   a   -   a   c        block 1:  0  0      slot 1:  b      y[blocks] += x[blocks] A^T B^T
                                          block 2:  4  4      slot 2:  c
                                          base:     2

    Any other model's rows are gathered to such blocks before each layer, and their results brought back. Where most
    rows that run have an adapter of their own, each is a block where it stands, with the slot that has its number: that
    is written once for a request, whose prompt and tokens find it there. Other prompts are so much more work that the
    adapters take turns: two products for each, on the rows that it has.

    A row's result comes from products of its own, whatever its neighbours ask for. Slots are written only where the
    adapters of a batch change; ranks are padded to the highest in the batch. They take `COPIES * memory` bytes at most:
    where those of a batch need more, its adapters take turns. `model.parts` says which layers of the checkpoint are one
    now (`serve.torch.fused`). Only outputs of layers are touched, so the layers may be quantized.
    """

    def __init__(self, model: Any, memory: int) -> None:
        self._model, self._memory = model, COPIES * memory
        self._parts: Mapping[str, Part] = model.parts
        self._layers: dict[str, Layer] = {}
        self._devices: dict[str, torch.device] = {}
        self._slots: list[Hashable] = []
        self._room = 0  # the rank that slots have room for
        self._asked: tuple[list[Hashable], int, int, int] | None = None
        self._orders = isinstance(vars(model).get("forward"), Stack)
        self._adapters: set[Hashable] = set()
        self._touched: set[str] = set()
        self._rank = 0
        self._size = 0
        self._model_size = sum(t.numel() for t in model.base_model.layers.parameters()) if self._orders else 0
        self.order: Order | None = None
        """How a `Stack` has to order the rows of the next forward pass."""

    def select(
        self, running: Sequence[Hashable], pool: Mapping[Any, Weights], width: int = 1, first: int = 0, last: int = -1
    ) -> None:
        """Name the adapter of each row that runs, a key of `pool`; an empty one is the base.

        The next forward pass computes those from `first` to `last`, by default all, with `width` tokens each.
        """
        last = len(running) if last < 0 else last
        asked = [*running], width, first, last
        if asked == self._asked:
            return
        self._asked = None
        adapters = {key for key in running if key}
        if adapters != self._adapters:
            self._adapters = set()  # until they are met: there may be no memory for their layers
            self._meet([pool[key] for key in adapters])
            self._adapters = adapters
        ordered = self._orders and all(layer.in_stack for layer in self._with(self._touched))
        order, plan = self._planned(running, first, last, pool, width, ordered)
        self.order = Order.of(order, self._model.device) if order != [*range(last - first)] else None
        own = self._with(set[str]().union(*(pool[key].layers for key in {*running[first:last]} if key)))
        for layer in self._layers.values():
            layer.follow(plan if layer in own else None)
        self._asked = asked

    def device(self, name: str) -> torch.device:
        """Where the weights for a layer of the checkpoint belong."""
        path = self._path(name)
        if path not in self._devices:  # asked for by each adapter that is read
            layer = self._model.get_submodule(path)
            self._devices[path] = next((t.device for t in (*layer.parameters(), *layer.buffers())), self._model.device)
        return self._devices[path]

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
        """The memory of the slots."""
        return self._bytes(len(self._slots), self._room)

    def _bytes(self, slots: int, rank: int) -> int:
        layers = [*self._layers.values()]  # another thread may ask
        return slots * rank * sum(layer.bytes for layer in layers)

    def _with(self, names: Set[str]) -> set[Layer]:
        """The layers that have some of the checkpoint's."""
        return {layer for layer in self._layers.values() if not names.isdisjoint(layer.parts)}

    def _meet(self, adapters: Sequence[Weights]) -> None:
        """Note what these adapters need, and hook into layers that none before had weights for."""
        self._rank = max((weights.rank for weights in adapters), default=0)
        self._size = max((weights.size for weights in adapters), default=0)
        self._touched = set().union(*(weights.layers for weights in adapters))
        for name, (a, b) in ((name, pair) for weights in adapters for name, pair in weights.layers.items()):
            path = self._path(name)
            if path not in self._layers:
                parts = {n: p for n, p in self._parts.items() if p.path == path} or {name: Part(path, 0, b.shape[1])}
                layer = Layer(parts, a)
                layer.resize(len(self._slots), self._room)
                self._layers[path] = layer
                module = self._model.get_submodule(path)
                if isinstance(module, Projection):
                    module.adapt, layer.in_stack = layer.add, self._orders
                else:
                    module.register_forward_hook(layer.hook)

    def _path(self, name: str) -> str:
        return self._parts[name].path if name in self._parts else name

    def _planned(
        self,
        running: Sequence[Hashable],
        first: int,
        last: int,
        pool: Mapping[Any, Weights],
        width: int,
        ordered: bool,
    ) -> tuple[list[int], Plan | Turns | None]:
        """The order of the rows, as they stand unless it is `ordered` by adapter, and how they are computed."""
        rows = running[first:last]
        order = [*range(len(rows))]
        if not any(rows):
            return order, None
        scaled = any(pool[key].scales for key in self._adapters)  # which blocks do not know
        if not scaled and self._alone(running, ordered):
            self._fill(rows, pool, first, len(running))
            return order, Plan(len(rows), len(rows), 1, self._rank, first)
        places = {key: place for place, key in enumerate(dict.fromkeys(rows))}
        grouped = sorted(order, key=lambda row: places[rows[row]]) if ordered else order
        turns = [(pool[key] if key else NOTHING, len([*same])) for key, same in groupby(rows[row] for row in grouped)]
        quick = width > 1 and (ordered or len(turns) <= FEW * max(1, width // WIDE))
        size, blocks = arrange(rows, width * self._row(ordered))
        if quick or scaled or self._bytes(len(blocks), self._rank) > self._memory:
            return grouped, Turns([weights for weights, _ in turns], [count for _, count in turns])
        blocks = self._filled(blocks, pool)
        source = [row for block in blocks for row in padded(block.rows, size)]
        if ordered:
            source += [row for row, key in enumerate(rows) if not key]
            return source, Plan(len(source), len(blocks), size, self._rank)
        results = [len(source)] * len(rows)  # where nothing but zeros is
        for i, block in enumerate(blocks):
            for j, row in enumerate(block.rows):
                results[row] = i * size + j
        gather = Gather(torch.tensor(source), torch.tensor(results))
        return order, Plan(len(rows), len(blocks), size, self._rank, gather=gather)

    def _row(self, ordered: bool) -> float:
        """What a row more costs, beside its adapter: it is computed by all of the model, or brought to its block."""
        return 1 + (self._model_size / self._size if ordered else MOVING)

    def _alone(self, running: Sequence[Hashable], ordered: bool) -> bool:
        """Whether it costs least that each row, the base's too, is a block where it stands, and there is memory."""
        if self._bytes(len(running), self._rank) > self._memory:
            return False
        size, blocks = arrange(running, self._row(ordered))
        if ordered:
            return size == 1 and READING * (len(running) - len(blocks)) <= MOVING * len(running)
        return cost(1, len(running), 1) <= cost(size, len(blocks), 1 + MOVING)

    def _filled(self, blocks: list[Block], pool: Mapping[Any, Weights]) -> list[Block]:
        """The blocks in the order of the first slots, which have their weights now.

        What those held of them stays where it is.
        """
        missing: dict[Hashable, list[Block]] = {}
        for block in blocks:
            missing.setdefault(block.adapter, []).append(block)
        held = [missing[key].pop(0) if missing.get(key) else None for key in self._slots[: len(blocks)]]
        held += [None] * (len(blocks) - len(held))
        rest = iter([block for left in missing.values() for block in left])
        ordered = [block or next(rest) for block in held]
        self._fill([block.adapter for block in ordered], pool)
        return ordered

    def _fill(self, keys: Sequence[Hashable], pool: Mapping[Any, Weights], first: int = 0, room: int = 0) -> None:
        """Give the slots from `first` on the weights of these, where they have others; there is `room` for more."""
        count = max(first + len(keys), room)
        if count > len(self._slots) or self._rank > self._room or self.bytes > self._memory:
            # few adapters need no room for many
            rounded = 1 << (count - 1).bit_length() if count < SLOTS else -(-count // SLOTS) * SLOTS
            slots, rank = max(rounded, len(self._slots)), max(self._rank, self._room)
            if self._bytes(slots, rank) > self._memory:
                slots, rank = count, self._rank
            kept = self._slots[:slots] if rank == self._room else []
            self._slots, self._room = [], 0  # until there is memory for all
            for layer in self._layers.values():
                layer.resize(slots, rank)
            self._slots, self._room = kept + [None] * (slots - len(kept)), rank
        for slot, key in enumerate(keys, first):
            if self._slots[slot] != key:
                self._slots[slot] = None  # until all of it is written
                weights = pool[key] if key else NOTHING
                pairs = [pair for layer in self._layers.values() for pair in layer.copies(slot, weights)]
                torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
                self._slots[slot] = key


def arrange(rows: Sequence[Hashable], row: float) -> tuple[int, list[Block]]:
    """The size of the blocks that costs least, and the blocks; `rows` are the adapters of the rows, empty for the base.

    A `row` costs so much to compute, in a block or in vain.
    """
    members: dict[Hashable, list[int]] = {}
    for place, key in enumerate(rows):
        if key:
            members.setdefault(key, []).append(place)
    counts = [len(places) for places in members.values()]

    def whole(size: int) -> float:
        return cost(size, sum(-(-count // size) for count in counts), row)

    size = min({*counts, *(1 << i for i in range(max(counts).bit_length()))}, key=whole)
    return size, [Block(key, own[i : i + size]) for key, own in members.items() for i in range(0, len(own), size)]


def cost(size: int, blocks: int, row: float) -> float:
    """What `blocks` blocks of `size` rows cost, in rows that are computed."""
    return blocks * (size * row + READING)


def padded(rows: list[int], size: int) -> list[int]:
    """As many rows as a block has; the first stands in for those that are missing."""
    return [*rows, *rows[:1] * (size - len(rows))]
