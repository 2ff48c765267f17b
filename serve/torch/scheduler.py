"""Which rows of the batch run next: admission, chunked prefill, preemption. A plain algorithm; no torch.

Row `i` of the KV cache belongs to `running[i]`. Rows are dense: those that decode come first, those whose prompt is not
read yet follow, so that a step always works on one slice of the cache:

    row   0      1      2      3        4        5
          decode decode decode prefill  prefill  (free)
          └──── decoding ────┘ └ running[3:] ┘

Where a generation leaves or changes sides, rows are copied; `take_moves()` lists what to copy before the next step.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from serve.generation import Generation


class Move(NamedTuple):
    """Copy row `source` to row `target`; with `exchange` the other way too."""

    source: int
    target: int
    exchange: bool


@dataclass(frozen=True)
class Step:
    """One forward pass over rows `first` to `first + len(rows)`, reading `counts[i]` more tokens of `rows[i]`."""

    first: int
    rows: list[Generation]
    counts: list[int]

    @property
    def width(self) -> int:
        """Tokens of the longest row; the others are padded to it."""
        return max(self.counts)


class Scheduler:
    """Continuous batching over at most `max_rows` rows.

    `max_cells` bounds the cache: rows x (longest one, rounded up to `block`). Generations start in the order they
    came. When those that run outgrow the cache, the youngest one waits again and is read anew later (its tokens are
    kept), so the oldest always goes on and everything finishes; one that can outgrow the cache alone must not be added.
    A prefill step reads at most `chunk` tokens of a generation and about `budget` tokens in all, and a decode step is
    made between two of them: a long prompt delays nobody for more than one chunk.
    """

    def __init__(self, max_rows: int, max_cells: int, *, chunk: int = 512, budget: int = 1024, block: int = 64) -> None:
        self.max_rows, self.max_cells = max_rows, max_cells
        self.chunk, self.budget, self.block = chunk, budget, block
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.decoding = 0
        self._moves: list[Move] = []
        self._prefilled = False

    def add(self, generation: Generation) -> None:
        """Queue a generation behind the others."""
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Forget a generation, finished or not; its row is free at once."""
        if generation in self.running:
            self._free(self.running.index(generation))
        else:
            self.waiting.remove(generation)

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to do. Follow it by `take_moves`, the work, and `advance`."""
        while len(self.running) > 1 and self._cells(self.running) > self.max_cells:
            self._preempt()
        self._admit()
        prefill_next = len(self.running) > self.decoding and not (self._prefilled and self.decoding)
        self._prefilled = prefill_next
        if prefill_next:
            return self._prefill()
        rows = self.running[: self.decoding]
        return Step(0, rows, [1] * len(rows)) if rows else None

    def take_moves(self) -> list[Move]:
        """What to copy now, in this order; each move is handed out once."""
        moves, self._moves = self._moves, []
        return moves

    def advance(self, step: Step) -> list[Generation]:
        """Note that `step` was done; returns the generations that have all tokens read, so that one more is due."""
        ready = []
        for generation, read in zip(step.rows, step.counts, strict=True):
            generation.cached += read
            if generation.left == 0:
                ready.append(generation)
        if step.first == self.decoding:  # a prefill step
            for generation in ready:
                self._swap(self.running.index(generation), self.decoding)
                self.decoding += 1
        return ready

    def _prefill(self) -> Step:
        # rows that were freed brought younger ones to the front; the oldest is always read
        oldest = min(range(self.decoding, len(self.running)), key=lambda i: self.running[i].arrival)
        self._swap(oldest, self.decoding)
        rows: list[Generation] = []
        width = 0
        for generation in self.running[self.decoding :]:
            wider = max(width, min(generation.left, self.chunk))
            if rows and wider * (len(rows) + 1) > self.budget:
                break
            rows.append(generation)
            width = wider
        return Step(self.decoding, rows, [min(generation.left, self.chunk) for generation in rows])

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_rows:
            # one block more than it needs now, or it would be preempted right away
            if self.running and self._cells([*self.running, self.waiting[0]], self.block) > self.max_cells:
                return
            self.running.append(self.waiting.popleft())

    def _preempt(self) -> None:
        row = max(range(len(self.running)), key=lambda i: self.running[i].arrival)
        generation = self.running[row]
        self._free(row)
        generation.cached = 0
        self.waiting.appendleft(generation)

    def _cells(self, rows: list[Generation], more: int = 0) -> int:
        longest = max(len(generation.tokens) for generation in rows) + more
        return len(rows) * -(-longest // self.block) * self.block

    def _free(self, row: int) -> None:
        """Close the gap with the last row of each side that `row` leaves."""
        if row < self.decoding:
            self.decoding -= 1
            self._copy(self.decoding, row)
            row = self.decoding
        self._copy(len(self.running) - 1, row)
        self.running.pop()

    def _copy(self, source: int, target: int) -> None:
        if source != target:
            self.running[target] = self.running[source]
            self._moves.append(Move(source, target, False))

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self._moves.append(Move(a, b, True))
            self.running[a], self.running[b] = self.running[b], self.running[a]
