"""The bytes of every merged tensor as blocks, each computed from the same rows of the base alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from export.lora.arithmetic import DTYPES, TILE_SIZE, Change, as_bytes, load, matrix, spans
from export.lora.combine import Combined
from export.lora.fit import Combination, Edit
from export.tensors import ITEM, Tensor
from export.writer import Block, Source

RowChange = Callable[[torch.Tensor, int], None]
"""Changes rows of a weight (n, columns), float32, in place; the number is that of the first."""
BLOCK_SIZE = 1 << 19
"""Elements read and written at once."""
COPY_SIZE = 1 << 18
"""Bytes copied at once."""


class Tile(NamedTuple):
    """Some rows of a block: what was read, float32 to work on, what is written; (rows, columns), partly one memory."""

    first: int
    given: torch.Tensor
    work: torch.Tensor
    result: torch.Tensor


class Views(NamedTuple):
    """One block's memory, as bytes to read and to write, and as the tiles that it is computed in."""

    read: memoryview
    tiles: list[Tile]
    write: memoryview


class Lane(threading.local):
    """The memory of one thread, the same for every block; a block of a form seen before costs nothing more."""

    def __init__(self) -> None:
        self.views: dict[tuple[int, int, str, str], Views] = {}
        self.read = self.work = self.write = torch.empty(0)
        self.bytes = memoryview(bytearray(COPY_SIZE))

    def get(self, rows: int, columns: int, source: str, target: str) -> Views:
        """Views for a block; what needs no other type is worked on where it was read, and written from there."""
        key = rows, columns, source, target
        if key not in self.views:
            if rows * columns > len(self.read):
                self.views.clear()
                self.read, self.work, self.write = (torch.empty(rows * columns, dtype=torch.float64) for _ in range(3))
            given = _carve(self.read, rows, columns, source)
            result = given if target == source else _carve(self.write, rows, columns, target)
            tiles = []
            for first, last in spans((rows, columns), TILE_SIZE):
                part, end = given[first:last], result[first:last]
                own = part if source == "F32" else end if target == "F32" else None
                work = _carve(self.work, last - first, columns, "F32") if own is None else own
                tiles.append(Tile(first, part, work, end))
            self.views[key] = Views(as_bytes(given), tiles, as_bytes(result))
        return self.views[key]


def _carve(memory: torch.Tensor, rows: int, columns: int, dtype: str) -> torch.Tensor:
    return memory.view(DTYPES[dtype])[: rows * columns].view(rows, columns)


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
            for offset in range(0, target.size, COPY_SIZE):
                size = min(COPY_SIZE, target.size - offset)
                yield Block(size, partial(self._copy, edit.source, offset, size))
            return
        change = self._change(edit)
        columns = matrix(target.shape)[1]
        row = columns * ITEM[target.dtype]
        for first, last in spans(target.shape, BLOCK_SIZE):
            yield Block((last - first) * row, partial(self._compute, edit, change, columns, first, last))

    def _change(self, edit: Edit) -> RowChange | None:
        if not edit.patches:
            return None
        changes = [(i, Change(patch, edit.source, self.source, self.load)) for i, patch in edit.patches]
        if not self.how.single:
            return Combined(edit.source, changes, self.how, self.source)
        change = changes[0][1]
        return change.low_rank if change.only_low_rank else change

    def _copy(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        data = self.lane.bytes[:size]
        self.source.read(tensor, offset, data)
        return data

    def _compute(self, edit: Edit, change: RowChange | None, columns: int, first: int, last: int) -> memoryview:
        source = edit.source
        view = self.lane.get(last - first, columns, source.dtype, edit.target.dtype)
        self.source.read(source, first * columns * ITEM[source.dtype], view.read)
        for row, given, work, result in view.tiles:
            if work is not given:
                work.copy_(given)
            if change:
                change(work, first + row)
            if result is not work:
                result.copy_(work)
        return view.write
