"""The scheduler as a plain algorithm: whatever comes, goes or is cancelled, rows are never mixed up or lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.generation import Generation, Request
from serve.torch.prefix import Prefixes
from serve.torch.scheduler import Reading, Scheduler, Step

BLOCK = 4


@dataclass
class Machine:
    """A scheduler with a cache that remembers of each cell what its keys and values would depend on.

    That is a number for the adapter and all tokens up to there, the same for the same beginnings only.
    """

    scheduler: Scheduler
    rows: dict[int, list[int]] = field(default_factory=dict)
    kept: dict[int, list[int]] = field(default_factory=dict)
    numbers: dict[tuple[str | int, int], int] = field(default_factory=dict)
    observed: dict[Generation, list[int]] = field(default_factory=dict)
    finished: list[Generation] = field(default_factory=list)
    started: list[Generation] = field(default_factory=list)

    def cells(self, row: Generation) -> list[int]:
        """What the cells of a generation must hold."""
        cells: list[int] = []
        for token in row.tokens:
            key = cells[-1] if cells else row.request.adapter, token
            cells.append(self.numbers.setdefault(key, len(self.numbers)))
        return cells

    def step(self) -> Step | None:
        step = self.scheduler.schedule()
        if step is None:
            return None
        self.copy(step)
        for row, block, place in step.loads:
            self.write(row, block * BLOCK, self.kept[place])
        running = self.scheduler.running
        if self.scheduler.reading != "padded":
            self.check_states(step)
        assert running[step.first : step.first + len(step.rows)] == step.rows
        assert all(0 < count <= row.left for row, count in zip(step.rows, step.counts, strict=True))
        for index, (row, count) in enumerate(zip(step.rows, step.counts, strict=True), step.first):
            # what the model reads back must be this generation's own tokens, all of them, in order
            assert self.rows.get(index, [])[: row.cached] == self.cells(row)[: row.cached]
            self.write(index, row.cached, self.cells(row)[row.cached : row.cached + count])
            self.observe(row, count)
            if row not in self.started:
                self.started.append(row)
        for row in self.scheduler.advance(step):
            row.tokens.append(len(row.tokens) % 2)
            if row.count == row.request.max_tokens:
                self.scheduler.remove(row)
                self.finished.append(row)
        self.check()
        return step

    def check_states(self, step: Step) -> None:
        """A row's state must be what its tokens made of it, and nothing else: neither padding nor another row."""
        assert len(set(step.counts)) == 1
        for index, row in enumerate(step.rows, step.first):
            if row.cached == 0:  # it begins with zeros
                self.rows[index] = []
            assert self.rows[index] == self.cells(row)[: row.cached]
            assert self.scheduler.reading == "even" or row.cached == 0 or row.left == 1
            assert self.scheduler.reading == "even" or step.counts[0] == row.left

    def write(self, row: int, start: int, cells: list[int]) -> None:
        held = self.rows.setdefault(row, [])
        assert len(held) >= start
        held[start : start + len(cells)] = cells

    def observe(self, row: Generation, count: int) -> None:
        if row.request.reads_all:
            last = min(row.cached + count, len(row.request.prompt))
            self.observed.setdefault(row, []).extend(range(max(row.cached, row.observed), last))
            row.observed = max(row.observed, last)

    def copy(self, step: Step) -> None:
        places = [copy.place for copy in step.keeps]
        assert len(places) == len(set(places)), "copied at once, in no order"
        for row, block, place in step.keeps:
            self.kept[place] = self.rows[row][block * BLOCK : (block + 1) * BLOCK]
            assert len(self.kept[place]) == BLOCK
        for row, cells in [(move.target, self.rows.get(move.source, [])[: move.length]) for move in step.moves]:
            self.rows[row] = cells

    def lose_the_cache(self, limit: int | None) -> None:
        self.scheduler.reset(limit)
        self.rows.clear()
        self.kept.clear()

    def run(self) -> None:
        """Until there is nothing to do, or far longer than that takes."""
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        for _ in range(100 * (len(everyone) + 1) * 61):
            if self.step() is None:
                break
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert set(everyone) <= set(self.finished)
        for row, places in self.observed.items():
            assert row not in self.finished or places == list(range(len(row.request.prompt)))

    def check(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_rows
        everyone = [*scheduler.running, *scheduler.waiting]
        assert len(set(map(id, everyone))) == len(everyone)
        assert not set(map(id, everyone)) & set(map(id, self.finished))
        assert all(row.left == 1 for row in scheduler.running[: scheduler.decoding])
        arrivals = [row.arrival for row in scheduler.waiting]
        assert arrivals == sorted(arrivals)


def generation(prompt: int, new: int, odd: int = -1, adapter: str = "", scored: bool = False) -> Generation:
    """A prompt of zeros, so that all begin alike, but for a one at place `odd`."""
    tokens = [int(place == odd) for place in range(prompt)]
    return Generation(Request(tokens, adapter, new, prompt_logprobs=0 if scored else None))


def machine(
    rows: int = 4, cells: int = 200, chunk: int = 8, budget: int = 16, kept: int = 0, reading: Reading = "padded"
) -> Machine:
    prefixes = Prefixes(kept if reading == "padded" else 0, BLOCK)
    return Machine(Scheduler(rows, cells, prefixes, chunk=chunk, budget=budget, block=BLOCK, reading=reading))


lengths = st.tuples(st.integers(1, 40), st.integers(1, 20))
requests = st.builds(
    generation,
    st.integers(1, 40),
    st.integers(1, 20),
    st.one_of(st.just(-1), st.integers(0, 39)),
    st.sampled_from(["", "a"]),
    st.booleans(),
)
steps = st.just("step")
cancels = st.integers(0, 50)
losses = st.sampled_from([None, 1, 2]).map(lambda limit: ("lost", limit))
readings = st.sampled_from(get_args(Reading))
actions = st.lists(st.one_of(requests, steps, steps, cancels, losses), max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    actions,
    st.integers(1, 6),
    st.integers(64, 300),
    st.integers(1, 16),
    st.integers(1, 40),
    st.integers(0, 12),
    readings,
)
def test_everything_finishes_and_no_cell_is_another_ones(
    actions: list[Any], rows: int, cells: int, chunk: int, budget: int, kept: int, reading: Reading
) -> None:
    run = machine(rows, cells, chunk, budget, kept, reading)
    added: list[Generation] = []
    cancelled: list[Generation] = []
    for action in actions:
        if isinstance(action, Generation):  # a request comes
            added.append(action)
            run.scheduler.add(action)
        elif action == "step":
            run.step()
        elif isinstance(action, tuple):  # a step failed, and all that was in memory is gone
            run.lose_the_cache(action[1])
        elif alive := [*run.scheduler.running, *run.scheduler.waiting]:  # a client goes
            cancelled.append(alive[action % len(alive)])
            run.scheduler.remove(cancelled[-1])
    run.run()
    assert len(run.finished) + len(cancelled) == len(added)
    assert set(run.finished) | set(cancelled) == set(added)


@pytest.mark.parametrize("kept", [0, 8])
def test_a_tiny_cache_makes_256_requests_wait_and_all_finish(kept: int) -> None:
    run = machine(rows=64, cells=96, chunk=16, budget=32, kept=kept)
    for number in range(256):
        run.scheduler.add(generation(1 + number % 30, 1 + number % 20, odd=number % 7))
    run.run()
    assert len(run.finished) == 256
    assert run.scheduler.preemptions > 0


def test_what_another_one_read_is_not_read_again() -> None:
    run = machine(rows=2, chunk=64, budget=64, kept=20)
    for _ in range(3):
        run.scheduler.add(generation(30, 6))
    read = []
    while step := run.step():
        if step.width > 1:
            read += step.counts
    # those that come together do not read the same together; the others leave out seven whole blocks
    assert read == [30, 2, 2]
    # its answer stands too: the next turn of a chat reads what is new, behind the last whole block
    turn = Generation(Request([*run.finished[0].tokens, 5, 5, 5], "", 2))
    run.scheduler.add(turn)
    run.step()
    assert (run.scheduler.looked_for, run.scheduler.found) == (129, 28 + 28 + 32)


def test_adapters_share_nothing() -> None:
    run = machine(chunk=64, budget=64, kept=20)
    for adapter in ("", "a", ""):
        run.scheduler.add(generation(30, 2, adapter=adapter))
        run.run()
    assert run.scheduler.found == 28


def test_another_one_may_read_on_while_a_prompt_waits() -> None:
    run = machine(chunk=6, budget=6, kept=20)
    old, young = generation(30, 2), generation(30, 2)
    run.scheduler.add(young)
    run.step()
    run.scheduler.add(old)  # it was in the way of something else so far
    run.run()
    assert run.scheduler.found == 4 + 28 - 6


def test_a_preempted_generation_comes_back_cheaply() -> None:
    run = machine(rows=2, cells=64, chunk=64, budget=64, kept=40)
    run.scheduler.add(generation(20, 20))
    run.scheduler.add(generation(20, 20, odd=1))
    run.run()
    assert run.scheduler.preemptions > 0
    assert run.scheduler.found > 16 * run.scheduler.preemptions


def test_after_a_lack_of_memory_fewer_run_at_once_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.torch.scheduler.CALM_STEPS", 20)
    run = machine(rows=8, cells=10_000)
    for _ in range(8):
        run.scheduler.add(generation(4, 40))
    widths = []
    run.step()
    run.lose_the_cache(4)
    while run.step():
        widths.append(len(run.scheduler.running))
    assert widths[0] == 4
    assert max(widths) == 8
    assert len(run.finished) == 8


def test_blocks_that_make_room_before_they_were_copied() -> None:
    run = machine(rows=6, cells=768, chunk=40, budget=240, kept=16)
    for number in range(6):
        run.scheduler.add(generation(100, 20, odd=number))
    run.run()
    assert len(run.finished) == 6


@settings(max_examples=80, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=20), st.integers(16, 50), st.sampled_from([8, 24]), readings)
@example([(26, 4), (24, 4), (24, 4)], 24, 24, "padded")  # the rest of the first, padded to what the third one reads
def test_the_cache_never_outgrows_its_limit(
    requests: list[tuple[int, int]], blocks: int, chunk: int, reading: Reading
) -> None:
    run = machine(rows=8, cells=blocks * BLOCK, chunk=chunk, budget=2 * chunk, reading=reading)
    for request in requests:
        run.scheduler.add(generation(*request))
    while (step := run.scheduler.schedule()) is not None:
        running = run.scheduler.running
        rows, length = step.shape(running)
        assert rows * -(-length // BLOCK) * BLOCK <= blocks * BLOCK
        assert all(row.cached + step.width <= length for row in step.rows)
        assert all(len(row.tokens) <= length for row in running)
        for row in run.scheduler.advance(step):
            row.tokens.append(0)
            if row.count == row.request.max_tokens:
                run.scheduler.remove(row)


@settings(max_examples=80, deadline=None)
@given(st.lists(lengths, min_size=2, max_size=20), st.integers(64, 200), st.sampled_from([0, 10]), readings)
@example([(1, 1), (1, 2), (6, 1), (1, 1), (1, 2)], 64, 0, "padded")
def test_the_oldest_is_never_put_back(requests: list[tuple[int, int]], cells: int, kept: int, reading: Reading) -> None:
    run = machine(rows=8, cells=cells, kept=kept, reading=reading)
    for request in requests:
        run.scheduler.add(generation(*request))
    while run.scheduler.running or run.scheduler.waiting:
        oldest = min([*run.scheduler.running, *run.scheduler.waiting], key=lambda row: row.arrival)
        before = oldest.cached
        run.step()
        run.step()
        assert oldest in run.finished or oldest.cached > before, "two steps passed it by"


def test_requests_start_in_the_order_they_came() -> None:
    run = machine(rows=2)
    requests = [generation(5, 3) for _ in range(6)]
    for request in requests:
        run.scheduler.add(request)
    while run.step():
        pass
    assert run.started == requests


def test_a_long_prompt_delays_others_by_one_chunk_at_most() -> None:
    run = machine(chunk=8)
    short = generation(3, 20)
    run.scheduler.add(short)
    run.step()
    run.scheduler.add(generation(64, 1))
    widths = []
    while short in run.scheduler.running:
        step = run.step()
        assert step is not None
        widths.append((short in step.rows, step.width))
    assert max(width for _, width in widths) == 8
    assert all(first or second for (first, _), (second, _) in itertools.pairwise(widths))


def test_prompts_are_read_together_up_to_the_budget() -> None:
    run = machine(rows=8, chunk=8, budget=16)
    for _ in range(5):
        run.scheduler.add(generation(8, 2))
    step = run.step()
    assert step is not None
    assert len(step.rows) == 2


@pytest.mark.parametrize(
    ("reading", "read"), [("even", [[8] * 3, [1] * 3, [5] * 2, [3]]), ("whole", [[9] * 2, [14], [8]])]
)
def test_rows_that_may_not_be_padded_are_read_beside_those_as_long(reading: Reading, read: list[list[int]]) -> None:
    run = machine(rows=8, chunk=8, budget=30, reading=reading)
    for length in (9, 14, 8, 9):
        run.scheduler.add(generation(length, 1))
    assert [step.counts for step in iter(run.step, None)] == read


def test_a_cancelled_generation_frees_its_row_before_the_next_step() -> None:
    run = machine(rows=1)
    first, second = generation(4, 10), generation(4, 10)
    run.scheduler.add(first)
    run.scheduler.add(second)
    run.step()
    run.scheduler.remove(first)
    step = run.step()
    assert step is not None
    assert step.rows == [second]


def test_nothing_to_do() -> None:
    assert machine().step() is None
    with pytest.raises(ValueError, match="not in"):
        machine().scheduler.remove(generation(1, 1))
