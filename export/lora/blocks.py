"""The bytes of every merged tensor as blocks, each computed from the same rows of the base alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from export.lora.arithmetic import DTYPES, TILE_SIZE, Change, as_bytes, load, matrix, shown, spans
from export.lora.combine import Combined
from export.lora.fit import Combination, Edit
from export.lora.kernel import Fused, takes
from export.tensors import ITEM, Tensor
from export.writer import Block, Source

RowChange = Callable[[torch.Tensor, int], None]
"""Changes rows of a weight (n, columns), float32, in place; the number is that of the first."""
BLOCK_SIZE = 1 << 19
"""Elements computed and written at once."""
WINDOW_SIZE = 1 << 22
"""Elements mapped at once: the kernel maps many pages with one entry of its tables, where they are side by side."""
COPY_SIZE, COPY_WINDOW = 1 << 20, 1 << 23
"""Bytes copied at once, and mapped at once for that."""


class Room(NamedTuple):
    """One block's memory: what is written (n, columns), its bytes, and the tiles to compute it in, by their rows."""

    result: torch.Tensor
    data: memoryview
    tiles: list[tuple[slice, torch.Tensor]]


class Lane(threading.local):
    """The memory of one thread, the same for every block; a block of a form seen before costs nothing more."""

    def __init__(self) -> None:
        self.rooms: dict[tuple[int, int, str], Room] = {}
        self.work = self.result = torch.empty(0)

    def get(self, rows: int, columns: int, dtype: str) -> Room:
        """Room for a block; what is written as float32 is worked on where it is written from."""
        key = rows, columns, dtype
        if key not in self.rooms:
            if rows * columns > len(self.result):
                self.rooms.clear()
                self.work, self.result = (torch.empty(rows * columns, dtype=torch.float64) for _ in range(2))
            result = _carve(self.result, rows, columns, dtype)
            tiles = []
            for first, last in spans((rows, columns), TILE_SIZE):
                work = result[first:last] if dtype == "F32" else _carve(self.work, last - first, columns, "F32")
                tiles.append((slice(first, last), work))
            self.rooms[key] = Room(result, as_bytes(result), tiles)
        return self.rooms[key]


def _carve(memory: torch.Tensor, rows: int, columns: int, dtype: str) -> torch.Tensor:
    return memory.view(DTYPES[dtype])[: rows * columns].view(rows, columns)


Compute = Callable[[torch.Tensor, int, Room], None]
"""Computes a block's result from rows of the source (n, columns), in its type; the number is that of the first."""


class Tiled:
    """Makes any change with PyTorch, in float32; none where a tensor only gets another type."""

    def __init__(self, change: RowChange | None) -> None:
        self.change = change

    def __call__(self, given: torch.Tensor, first: int, room: Room) -> None:
        """Compute a block."""
        for rows, work in room.tiles:
            work.copy_(given[rows])
            if self.change:
                self.change(work, first + rows.start)
            if work.dtype != room.result.dtype:
                room.result[rows].copy_(work)


class Merger:
    """Gives the bytes of every merged tensor, block by block."""

    def __init__(self, edits: Sequence[Edit], how: Combination, source: Source) -> None:
        self.edits = {e.target.name: e for e in edits}
        self.how, self.source = how, source
        self.lane = Lane()
        # experts share their pair of factors, and lie together
        self.load = lru_cache(maxsize=4)(partial(load, source=source))

    def blocks(self, target: Tensor) -> Iterator[Block]:
        """The bytes of `target` in order."""
        edit = self.edits[target.name]
        if edit.copied:
            yield from self._copies(edit.source)
            return
        compute, shape = self._compute(edit), edit.source.shape
        columns = matrix(shape)[1]
        row = columns * ITEM[target.dtype]
        for top, bottom in spans(shape, WINDOW_SIZE):
            window = shown(edit.source, top, bottom - top, self.source)
            for first, last in spans((bottom - top, columns), BLOCK_SIZE):
                make = partial(self._make, compute, window[first:last], top + first, target.dtype)
                yield Block((last - first) * row, make)

    def _copies(self, tensor: Tensor) -> Iterator[Block]:
        for offset in range(0, tensor.size, COPY_WINDOW):
            window = self.source.show(tensor, offset, min(COPY_WINDOW, tensor.size - offset))
            for start in range(0, len(window), COPY_SIZE):
                part = window[start : start + COPY_SIZE]
                yield Block(len(part), part.toreadonly)

    def _compute(self, edit: Edit) -> Compute:
        if not edit.patches:
            return Tiled(None)
        changes = [(i, Change(patch, edit.source, self.source, self.load)) for i, patch in edit.patches]
        if not self.how.single:
            return Tiled(Combined(edit.source, changes, self.how, self.source))
        change = changes[0][1]
        types = edit.source.dtype, edit.target.dtype
        if (plain := change.plain) and takes(matrix(edit.source.shape), *types):
            add = Fused(plain.left, plain.right, plain.scale, *types)
            return lambda given, first, room: add(given, first, room.result)
        return Tiled(change)

    def _make(self, compute: Compute, given: torch.Tensor, first: int, dtype: str) -> memoryview:
        rows, columns = given.shape
        room = self.lane.get(rows, columns, dtype)
        compute(given, first, room)
        return room.data
