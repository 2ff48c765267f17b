"""Which rows of the batch run next: admission, chunked prefill, preemption. A plain algorithm; no torch.

Row `i` of the KV cache belongs to `running[i]`. Rows are dense: those that decode come first, those whose prompt is not
read yet follow, so that a step always works on one slice of the cache:

    row   0      1      2      3        4        5
          decode decode decode prefill  prefill  (free)
          └──── decoding ────┘ └ running[3:] ┘

Where a generation leaves or changes sides, others take another row; `Step.moves` says what to copy for that. Whole
blocks of what was read are kept for requests that begin alike (see prefix.py): `Step.keeps` copies them out of rows
that read a part of a prompt or whose generation left, and `Step.loads` into rows before their prompt is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from serve.generation import Generation
from serve.torch.prefix import Prefixes

CALM_STEPS = 256
"""After so many steps twice as many rows may run again as after a memory error."""

Reading = Literal["padded", "even", "whole"]
"""How rows are read together: as many tokens of each as there are, the shorter ones padded; equally many of each, where
padding would go into a state; or none of them in parts, where a state is gone on from by single tokens only."""


class Move(NamedTuple):
    """The first `length` tokens of row `source` go to row `target`."""

    source: int
    target: int
    length: int


class Copy(NamedTuple):
    """Block number `block` of row `row`, and its place among the kept ones."""

    row: int
    block: int
    place: int


@dataclass
class Step:
    """One forward pass over rows `first` to `first + len(rows)`, reading `counts[i]` more tokens of `rows[i]`.

    Before it blocks are kept, then all moves are made at once, then blocks are loaded.
    """

    first: int
    rows: list[Generation]
    counts: list[int]
    loads: list[Copy] = field(default_factory=list)
    keeps: list[Copy] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Tokens of the longest row; the others are padded to it."""
        return max(self.counts)

    def shape(self, running: Sequence[Generation]) -> tuple[int, int]:
        """The rows that the cache must have room for, those of `running`, and their length, padding included."""
        padded = max([generation.cached for generation in self.rows]) + self.width
        return len(running), max([padded, *[len(generation.tokens) for generation in running]])


class Scheduler:
    """Continuous batching over at most `max_rows` rows.

    `max_cells` bounds the cache: rows x (longest one, rounded up to `block`). Generations start in the order they
    came. When those that run outgrow the cache, the youngest one waits again and is read anew later (its tokens are
    kept), so the oldest always goes on and everything finishes; one that can outgrow the cache alone must not be added.
    A prefill step reads at most `chunk` tokens of a generation and about `budget` tokens in all, with no padding that
    would outgrow the cache, and a decode step is made between two of them: a long prompt delays nobody for more than
    one chunk, unless prompts are to be read `whole`.
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
        reading: Reading = "padded",
    ) -> None:
        self.max_rows, self.max_cells, self.prefixes = max_rows, max_cells, prefixes
        self.reading = reading
        self.chunk, self.budget, self.block = chunk, budget, block
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.decoding = 0
        self.preemptions = 0
        self.looked_for, self.found = 0, 0
        """Tokens of prompts that kept blocks were looked for, and those that were found."""
        self._limit, self._calm = max_rows, 0
        self._keeps: dict[int, Copy] = {}
        """By place: a block that made room before it was copied is copied no more."""
        self._prefilled = False

    def add(self, generation: Generation) -> None:
        """Queue a generation behind the others."""
        self.waiting.append(generation)

    def remove(self, generation: Generation, *, keep: bool = True) -> None:
        """Forget a generation, finished or not; its row is free at once, its blocks kept for others with `keep`."""
        if generation in self.running:
            row = self.running.index(generation)
            if keep:
                self._keep(generation)
            self._free(row)
        else:
            self.waiting.remove(generation)

    def reset(self, limit: int | None = None) -> None:
        """Forget all that the cache holds: what ran waits again, to be read anew, with what was kept gone too.

        No more than `limit` rows run at first from now on, in order not to run out of memory again.
        """
        self.waiting.extendleft(sorted(self.running, key=lambda generation: generation.arrival, reverse=True))
        for generation in self.running:
            generation.cached, generation.row = 0, None
        self.running, self.decoding = [], 0
        self.prefixes.clear()
        self._keeps.clear()
        if limit is not None:
            self._limit, self._calm = max(1, limit), 0

    def schedule(self) -> Step | None:
        """The next step, or None when there is nothing to do. Follow it by the work, and `advance`."""
        while len(self.running) > 1 and self._cells(self.running) > self.max_cells:
            self._preempt()
        self._admit()
        prefill_next = len(self.running) > self.decoding and not (self._prefilled and self.decoding)
        self._prefilled = prefill_next
        if not self.running:
            return None
        step = self._prefill() if prefill_next else self._decode()
        step.keeps, self._keeps = [*self._keeps.values()], {}
        for row, generation in enumerate(self.running):
            if generation.row is not None and generation.row != row:
                step.moves.append(Move(generation.row, row, generation.cached))
            generation.row = row
        return step

    def advance(self, step: Step) -> list[Generation]:
        """Note that `step` was done; returns the generations that have all tokens read, so that one more is due."""
        self._relax()
        ready = []
        for generation, read in zip(step.rows, step.counts, strict=True):
            generation.cached += read
            if generation.left == 0:
                ready.append(generation)
        if step.first == self.decoding:  # a prefill step
            for generation in step.rows:
                self._keep(generation)
            for generation in ready:
                self._swap(self.running.index(generation), self.decoding)
                self.decoding += 1
        return ready

    @property
    def cells(self) -> int:
        """How much of `max_cells` is in use."""
        rows = [*self.running]  # another thread may ask
        return self._cells(rows) if rows else 0

    def _decode(self) -> Step:
        return Step(0, self.running[: self.decoding], [1] * self.decoding)

    def _prefill(self) -> Step:
        # rows that were freed brought younger ones to the front; the oldest is always read
        oldest = min(range(self.decoding, len(self.running)), key=lambda i: self.running[i].arrival)
        self._swap(oldest, self.decoding)
        return self._prefill_padded() if self.reading == "padded" else self._prefill_evenly()

    def _prefill_evenly(self) -> Step:
        """As many tokens of each row as of the oldest; rows with fewer left wait until they are the oldest."""
        first, whole = self.decoding, self.reading == "whole"
        left = self.running[first].left
        width = left if whole else min(left, self.chunk)
        last = first + 1
        for row in range(last, len(self.running)):
            left = self.running[row].left
            if (left == width if whole else left >= width) and (last + 1 - first) * width <= self.budget:
                self._swap(row, last)
                last += 1
        return Step(first, self.running[first:last], [width] * (last - first))

    def _prefill_padded(self) -> Step:
        rows: list[Generation] = []
        loads: list[Copy] = []
        reading: set[Hashable] = set()
        room = self.max_cells // len(self.running) // self.block * self.block  # for each, padding included
        width = start = 0
        for row, generation in enumerate(self.running[self.decoding :], self.decoding):
            found, following = self._find(row)
            loads += found
            wider, further = max(width, min(generation.left, self.chunk)), max(start, generation.cached)
            large = wider * (len(rows) + 1) > self.budget or further + wider > room
            # one that begins like another waits for it, and takes over what that one reads
            if rows and (large or following in reading):
                break
            rows.append(generation)
            reading.add(following)
            width, start = wider, further
        return Step(self.decoding, rows, [min(generation.left, self.chunk) for generation in rows], loads)

    def _find(self, row: int) -> tuple[list[Copy], Hashable]:
        """What is kept of a prompt beyond the tokens that were read; another one may have read them meanwhile.

        Also the block that is read next, which equals others' where both would keep the same.
        """
        generation, size = self.running[row], self.prefixes.size
        last = len(generation.tokens) - 1  # one must be read to know what follows
        if generation.request.reads_all and generation.observed < len(generation.request.prompt):
            last = min(last, generation.observed)
        places = self.prefixes.find(generation.weights, generation.tokens[:last])
        known = generation.cached // size
        copies = [Copy(row, block, place) for block, place in enumerate(places[known:], known)]
        if copies:
            found = len(places) * size - generation.cached
            self.found += found
            if generation.count == 0:
                generation.reused = found + (generation.reused if generation.cached else 0)
            generation.cached = len(places) * size
        start = len(places) * size
        if start + size > last or start != generation.cached or len(places) == self.prefixes.blocks:
            return copies, generation  # none that others could use
        return copies, (generation.weights, *places[-1:], *generation.tokens[start : start + size])

    def _keep(self, generation: Generation) -> None:
        if generation.row is None:
            return
        known, places = self.prefixes.keep(generation.weights, generation.tokens[: generation.cached])
        self._keeps |= {place: Copy(generation.row, block, place) for block, place in enumerate(places, known)}

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
        self._keep(generation)
        self._free(row)
        generation.cached, generation.row = 0, None
        self.waiting.appendleft(generation)
        self.preemptions += 1

    def _cells(self, rows: list[Generation], more: int = 0) -> int:
        longest = max(len(generation.tokens) for generation in rows) + more
        return len(rows) * -(-longest // self.block) * self.block

    def _free(self, row: int) -> None:
        """Close the gap with the last row of each side that `row` leaves."""
        if row < self.decoding:
            self.decoding -= 1
            self.running[row] = self.running[self.decoding]
            row = self.decoding
        self.running[row] = self.running[-1]
        self.running.pop()

    def _swap(self, a: int, b: int) -> None:
        self.running[a], self.running[b] = self.running[b], self.running[a]
