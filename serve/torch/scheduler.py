"""Which rows of the batch run next: admission, chunked prefill, preemption. A plain algorithm; no torch.

Row `i` of the KV cache belongs to `running[i]`. Rows are dense: those that decode come first, those whose prompt is not
read yet follow, so that a step always works on one slice of the cache:

    row   0      1      2      3        4        5
          decode decode decode prefill  prefill  (free)
          └──── decoding ────┘ └ running[3:] ┘

Where a generation leaves or changes sides, rows are copied; `take_moves()` lists what to copy before the next step.
Whole blocks of what was read are kept for requests that begin alike (see prefix.py): rows are copied to those as soon
as a part of a prompt is read and when a generation leaves, and from those (`Step.loads`) before a prompt is read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from serve.generation import Generation
from serve.torch.prefix import Prefixes

CALM_STEPS = 256
"""After so many steps twice as many rows may run again as after a memory error."""


class Move(NamedTuple):
    """Copy row `source` to row `target`; with `exchange` the other way too."""

    source: int
    target: int
    exchange: bool


class Copy(NamedTuple):
    """Block number `block` of row `row`, and its place among the kept ones."""

    row: int
    block: int
    place: int


@dataclass(frozen=True)
class Step:
    """One forward pass over rows `first` to `first + len(rows)`, reading `counts[i]` more tokens of `rows[i]`."""

    first: int
    rows: list[Generation]
    counts: list[int]
    loads: list[Copy] = field(default_factory=list)
    """Kept blocks to be copied into their rows before."""

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

    def __init__(
        self,
        max_rows: int,
        max_cells: int,
        prefixes: Prefixes,
        *,
        chunk: int = 512,
        budget: int = 1024,
        block: int = 64,
    ) -> None:
        self.max_rows, self.max_cells, self.prefixes = max_rows, max_cells, prefixes
        self.chunk, self.budget, self.block = chunk, budget, block
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.decoding = 0
        self.preemptions = 0
        self.looked_for, self.found = 0, 0
        """Tokens of prompts that kept blocks were looked for, and those that were found."""
        self._limit, self._calm = max_rows, 0
        self._moves: list[Move | Copy] = []
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

    def reset(self, limit: int | None = None) -> None:
        """Forget all that the cache holds: what ran waits again, to be read anew, with what was kept gone too.

        No more than `limit` rows run at first from now on, in order not to run out of memory again.
        """
        self.waiting.extendleft(sorted(self.running, key=lambda generation: generation.arrival, reverse=True))
        for generation in self.running:
            generation.cached = 0
        self.running, self.decoding = [], 0
        self.prefixes.clear()
        self._moves.clear()
        if limit is not None:
            self._limit, self._calm = max(1, limit), 0

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

    def take_moves(self) -> list[Move | Copy]:
        """What to copy now, in this order: rows to rows, and blocks of rows to be kept. Each is handed out once."""
        moves, self._moves = self._moves, []
        return moves

    def advance(self, step: Step) -> list[Generation]:
        """Note that `step` was done; returns the generations that have all tokens read, so that one more is due."""
        self._relax()
        ready = []
        for generation, read in zip(step.rows, step.counts, strict=True):
            generation.cached += read
            if generation.left == 0:
                ready.append(generation)
        if step.first == self.decoding:  # a prefill step
            for row in range(step.first, step.first + len(step.rows)):
                self._keep(row)
            for generation in ready:
                self._swap(self.running.index(generation), self.decoding)
                self.decoding += 1
        return ready

    @property
    def cells(self) -> int:
        """How much of `max_cells` is in use."""
        return self._cells(self.running) if self.running else 0

    def _prefill(self) -> Step:
        # rows that were freed brought younger ones to the front; the oldest is always read
        oldest = min(range(self.decoding, len(self.running)), key=lambda i: self.running[i].arrival)
        self._swap(oldest, self.decoding)
        rows: list[Generation] = []
        loads: list[Copy] = []
        width = 0
        for row, generation in enumerate(self.running[self.decoding :], self.decoding):
            loads += self._find(row)
            wider = max(width, min(generation.left, self.chunk))
            if rows and wider * (len(rows) + 1) > self.budget:
                break
            rows.append(generation)
            width = wider
        return Step(self.decoding, rows, [min(generation.left, self.chunk) for generation in rows], loads)

    def _find(self, row: int) -> list[Copy]:
        """What is kept of a prompt beyond the tokens that were read; another one may have read them meanwhile."""
        generation, size = self.running[row], self.prefixes.size
        last = len(generation.tokens) - 1  # one must be read to know what follows
        if generation.request.reads_all and generation.observed < len(generation.request.prompt):
            last = min(last, generation.observed)
        places = self.prefixes.find(generation.weights, generation.tokens[:last])
        known = generation.cached // size
        if len(places) <= known:
            return []
        self.found += len(places) * size - generation.cached
        generation.cached = len(places) * size
        return [Copy(row, block, place) for block, place in enumerate(places[known:], known)]

    def _keep(self, row: int) -> None:
        generation = self.running[row]
        known, places = self.prefixes.keep(generation.weights, generation.tokens[: generation.cached])
        self._moves += [Copy(row, block, place) for block, place in enumerate(places, known)]

    def _admit(self) -> None:
        while self.waiting and len(self.running) < min(self.max_rows, self._limit):
            # one block more than it needs now, or it would be preempted right away
            if self.running and self._cells([*self.running, self.waiting[0]], self.block) > self.max_cells:
                return
            self.running.append(self.waiting.popleft())
            self.looked_for += len(self.running[-1].tokens)

    def _relax(self) -> None:
        if self._limit < self.max_rows:
            self._calm += 1
            if self._calm == CALM_STEPS:
                self._limit, self._calm = 2 * self._limit, 0

    def _preempt(self) -> None:
        row = max(range(len(self.running)), key=lambda i: self.running[i].arrival)
        generation = self.running[row]
        self._free(row)
        generation.cached = 0
        self.waiting.appendleft(generation)
        self.preemptions += 1

    def _cells(self, rows: list[Generation], more: int = 0) -> int:
        longest = max(len(generation.tokens) for generation in rows) + more
        return len(rows) * -(-longest // self.block) * self.block

    def _free(self, row: int) -> None:
        """Close the gap with the last row of each side that `row` leaves."""
        self._keep(row)
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
