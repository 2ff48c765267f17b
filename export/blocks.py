"""The bytes of every merged tensor as blocks, each computed from the same rows of the base alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch

from export.combine import Combined
from export.fit import Combination, Edit
from export.lora import DTYPES, Change, as_bytes, load, matrix, spans
from export.tensors import Tensor
from export.writer import Block, Source

COPY_SIZE = 1 << 18
"""Bytes copied at once."""


class Views(NamedTuple):
    """One block's memory: `read` and `write` as bytes, `given`, `work` and `result` (rows, columns) as numbers."""

    read: memoryview
    given: torch.Tensor
    work: torch.Tensor
    result: torch.Tensor
    write: memoryview


class Lane(threading.local):
    """Memory of a writing thread, used again for every block of the same form."""

    def __init__(self) -> None:
        self.views: dict[tuple[int, int, str, str], Views] = {}
        self.bytes = memoryview(bytearray(COPY_SIZE))

    def get(self, rows: int, columns: int, source: str, target: str) -> Views:
        """Views of memory for a block; float32 numbers are worked on where they are read, and written from there."""
        key = rows, columns, source, target
        if key not in self.views:
            if len(self.views) > 8:
                self.views.clear()
            work = torch.empty(rows, columns)
            given = work if source == "F32" else torch.empty(rows, columns, dtype=DTYPES[source])
            result = work if target == "F32" else torch.empty(rows, columns, dtype=DTYPES[target])
            self.views[key] = Views(as_bytes(given), given, work, result, as_bytes(result))
        return self.views[key]


class Merger:
    """Gives the bytes of every merged tensor, block by block."""

    def __init__(self, edits: Sequence[Edit], how: Combination, source: Source) -> None:
        self.edits = {e.target.name: e for e in edits}
        self.how, self.source = how, source
        self.lane = Lane()
        self.load = lru_cache(maxsize=4)(
            partial(load, source=source)
        )  # experts, whose tensors lie together, share a pair

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
        item = target.size // max(1, prod(target.shape))
        for first, last in spans(target.shape):
            yield Block((last - first) * columns * item, partial(self._compute, edit, change, first, last))

    def _change(self, edit: Edit) -> Change | Combined | None:
        if not edit.patches:
            return None
        changes = [(i, Change(patch, edit.source, self.source, self.load)) for i, patch in edit.patches]
        return changes[0][1] if self.how.single else Combined(edit.source, changes, self.how, self.source)

    def _copy(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        data = self.lane.bytes[:size]
        self.source.read(tensor, offset, data)
        return data

    def _compute(self, edit: Edit, change: Change | Combined | None, first: int, last: int) -> memoryview:
        columns = matrix(edit.target.shape)[1]
        view = self.lane.get(last - first, columns, edit.source.dtype, edit.target.dtype)
        self.source.read(edit.source, first * columns * view.given.element_size(), view.read)
        if view.given is not view.work:
            view.work.copy_(view.given)
        if change:
            change(view.work, first)
        if view.result is not view.work:
            view.result.copy_(view.work)
        return view.write
