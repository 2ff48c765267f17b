"""Rows of a batch and their adapters, whose weights are brought side by side for batched products: on any device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from serve.torch.fused import Part
from serve.torch.low_rank import NOTHING, Weights
from serve.torch.slot_layer import Gather, Layer, Plan, Turns

READING, MOVING = 16, 6
"""Reading the weights of a block takes about as long as computing this many rows with them; bringing a row to its block
and its result back, as long as computing this many."""
SLOTS = 8
"""Above so many slots, so many come at a time."""
COPIES = 4
"""Slots may take so many times the memory that adapters may: an adapter with many rows may have several."""
FEW = 8
"""Turns that are quickly begun, where a row has few tokens."""
WIDE = 16
"""Tokens in a row from which on the products of a row take much longer than to begin them."""


class Block(NamedTuple):
    """Rows of a batch that have one adapter."""

    adapter: Hashable
    rows: list[int]


class Slots:
    """Where a token is computed for each row, rows of one adapter are blocks of one size, each with a slot.

    That has the adapter's weights, so that two batched matrix products compute all blocks, to which rows are gathered
    before each layer, and from which their results are brought back:

        row      0   1   2   3   4        block 0:  1  3      slot 0:  a
        adapter  b   a   -   a   c        block 1:  0  0      slot 1:  b      y[blocks] += x[blocks] A^T B^T
                                          block 2:  4  4      slot 2:  c

    Prompts are so much more work that the adapters take turns: two products for each, on the rows that it has. Slots
    are written only where the adapters of a batch change; ranks are padded to the highest in the batch. They take
    `COPIES * memory` bytes at most: where those of a batch need more, its adapters take turns.
    """

    def __init__(self, memory: int) -> None:
        self._memory = COPIES * memory
        self._layers: list[Layer] = []
        self._slots: list[Hashable] = []
        self._room = 0  # the rank that slots have room for

    def layer(self, parts: Mapping[str, Part], like: torch.Tensor) -> Layer:
        """A layer with these parts more; A of an adapter is of the type of `like` (rank, in), and lies beside it."""
        layer = Layer(parts, like)
        layer.resize(len(self._slots), self._room)
        self._layers.append(layer)
        return layer

    def plan(self, rows: Sequence[Hashable], pool: Mapping[Any, Weights], width: int) -> Plan | Turns | None:
        """How layers have to compute rows of these adapters with `width` tokens each."""
        adapters = [pool[key] for key in {*rows} if key]
        if not adapters:
            return None
        rank = max(weights.rank for weights in adapters)
        turns = [(pool[key] if key else NOTHING, len([*same])) for key, same in groupby(rows)]
        quick = width > 1 and len(turns) <= FEW * max(1, width // WIDE)
        scaled = any(weights.scales for weights in adapters)  # which blocks do not know
        size, blocks = arrange(rows, width * (1 + MOVING))
        if quick or scaled or self._bytes(len(blocks), rank) > self._memory:
            return Turns([weights for weights, _ in turns], [count for _, count in turns])
        blocks = self._filled(blocks, pool, rank)
        source = [row for block in blocks for row in padded(block.rows, size)]
        results = [len(source)] * len(rows)  # where nothing but zeros is
        for i, block in enumerate(blocks):
            for j, row in enumerate(block.rows):
                results[row] = i * size + j
        return Plan(len(rows), len(blocks), rank, Gather(torch.tensor(source), torch.tensor(results)))

    @property
    def bytes(self) -> int:
        """The memory of the slots."""
        return self._bytes(len(self._slots), self._room)

    def _bytes(self, slots: int, rank: int) -> int:
        layers = [*self._layers]  # another thread may ask
        return slots * rank * sum(layer.bytes for layer in layers)

    def _filled(self, blocks: list[Block], pool: Mapping[Any, Weights], rank: int) -> list[Block]:
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
        self._fill([block.adapter for block in ordered], pool, rank)
        return ordered

    def _fill(self, keys: Sequence[Hashable], pool: Mapping[Any, Weights], needed: int) -> None:
        """Give the first slots the weights of these, where they have others."""
        count = len(keys)
        if count > len(self._slots) or needed > self._room or self.bytes > self._memory:
            # few adapters need no room for many
            rounded = 1 << (count - 1).bit_length() if count < SLOTS else -(-count // SLOTS) * SLOTS
            slots, rank = max(rounded, len(self._slots)), max(needed, self._room)
            if self._bytes(slots, rank) > self._memory:
                slots, rank = count, needed
            kept = self._slots[:slots] if rank == self._room else []
            self._slots, self._room = [], 0  # until there is memory for all
            for layer in self._layers:
                layer.resize(slots, rank)
            self._slots, self._room = kept + [None] * (slots - len(kept)), rank
        for slot, key in enumerate(keys):
            if self._slots[slot] != key:
                self._slots[slot] = None  # until all of it is written
                pairs = [pair for layer in self._layers for pair in layer.copies(slot, pool[key])]
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

    def cost(size: int) -> float:
        return sum(-(-count // size) for count in counts) * (size * row + READING)

    size = min({*counts, *(1 << i for i in range(max(counts).bit_length()))}, key=cost)
    return size, [Block(key, own[i : i + size]) for key, own in members.items() for i in range(0, len(own), size)]


def padded(rows: list[int], size: int) -> list[int]:
    """As many rows as a block has; the first stands in for those that are missing."""
    return [*rows, *rows[:1] * (size - len(rows))]
