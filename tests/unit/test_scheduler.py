"""The scheduler as a plain algorithm: whatever comes, goes or is cancelled, rows are never mixed up or lost."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.generation import Generation, Request
from serve.torch.prefix import Prefixes
from serve.torch.scheduler import Scheduler, Step

BLOCK = 4


@dataclass
class Machine:
    """A scheduler with a cache that only remembers whose tokens stand in each row."""

    scheduler: Scheduler
    rows: dict[int, list[tuple[Generation, int]]] = field(default_factory=dict)
    finished: list[Generation] = field(default_factory=list)
    started: list[Generation] = field(default_factory=list)

    def step(self) -> Step | None:
        step = self.scheduler.schedule()
        self.apply_moves()
        if step is None:
            return None
        running = self.scheduler.running
        assert running[step.first : step.first + len(step.rows)] == step.rows
        assert all(0 < count <= row.left for row, count in zip(step.rows, step.counts, strict=True))
        for index, (row, count) in enumerate(zip(step.rows, step.counts, strict=True), step.first):
            tokens = self.rows.setdefault(index, [])
            # what the model reads back must be this generation's own tokens, all of them, in order
            assert tokens[: row.cached] == [(row, position) for position in range(row.cached)]
            self.rows[index] = tokens[: row.cached] + [(row, row.cached + i) for i in range(count)]
            if row not in self.started:
                self.started.append(row)
        for row in self.scheduler.advance(step):
            row.tokens.append(0)
            if len(row.new) == row.request.max_tokens:
                self.scheduler.remove(row)
                self.finished.append(row)
        self.check()
        return step

    def apply_moves(self) -> None:
        for move in self.scheduler.take_moves():
            source, target = self.rows.get(move.source, []), self.rows.get(move.target, [])
            self.rows[move.target] = list(source)
            if move.exchange:
                self.rows[move.source] = list(target)

    def check(self) -> None:
        scheduler = self.scheduler
        assert len(scheduler.running) <= scheduler.max_rows
        everyone = [*scheduler.running, *scheduler.waiting]
        assert len(set(map(id, everyone))) == len(everyone)
        assert not set(map(id, everyone)) & set(map(id, self.finished))
        assert all(row.left == 1 for row in scheduler.running[: scheduler.decoding])
        arrivals = [row.arrival for row in scheduler.waiting]
        assert arrivals == sorted(arrivals)


def generation(prompt: int, new: int) -> Generation:
    return Generation(Request(prompt=[0] * prompt, max_tokens=new))


def machine(rows: int = 4, cells: int = 200, chunk: int = 8, budget: int = 16) -> Machine:
    return Machine(Scheduler(rows, cells, Prefixes(0, BLOCK), chunk=chunk, budget=budget, block=BLOCK))


lengths = st.tuples(st.integers(1, 40), st.integers(1, 20))
actions = st.lists(st.one_of(lengths, st.integers(0, 50), st.none()), max_size=60)


@settings(max_examples=150, deadline=None)
@given(actions, st.integers(1, 6), st.integers(64, 300), st.integers(1, 16), st.integers(1, 40))
def test_everything_finishes_and_rows_stay_their_owners(
    actions: list[tuple[int, int] | int | None], rows: int, cells: int, chunk: int, budget: int
) -> None:
    run = machine(rows, cells, chunk, budget)
    added: list[Generation] = []
    cancelled: list[Generation] = []
    for action in actions:
        if isinstance(action, tuple):  # a request comes
            added.append(generation(*action))
            run.scheduler.add(added[-1])
        elif action is None:
            run.step()
        elif alive := [*run.scheduler.running, *run.scheduler.waiting]:  # a client goes
            cancelled.append(alive[action % len(alive)])
            run.scheduler.remove(cancelled[-1])
    for _ in range(100 * (len(added) + 1) * 61):
        if run.step() is None:
            break
    assert not run.scheduler.running
    assert not run.scheduler.waiting
    assert len(run.finished) + len(cancelled) == len(added)
    assert set(map(id, run.finished)) | set(map(id, cancelled)) == set(map(id, added))


@settings(max_examples=80, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=20), st.integers(64, 200))
def test_the_cache_never_outgrows_its_limit(requests: list[tuple[int, int]], cells: int) -> None:
    run = machine(rows=8, cells=cells)
    for request in requests:
        run.scheduler.add(generation(*request))
    while (step := run.scheduler.schedule()) is not None:
        run.apply_moves()
        running = run.scheduler.running
        longest = -(-max(len(row.tokens) for row in running) // BLOCK) * BLOCK
        assert len(running) == 1 or len(running) * longest <= cells
        for row in run.scheduler.advance(step):
            row.tokens.append(0)
            if len(row.new) == row.request.max_tokens:
                run.scheduler.remove(row)


@settings(max_examples=80, deadline=None)
@given(st.lists(lengths, min_size=2, max_size=20), st.integers(64, 200))
@example([(1, 1), (1, 2), (6, 1), (1, 1), (1, 2)], 64)
def test_the_oldest_is_never_put_back(requests: list[tuple[int, int]], cells: int) -> None:
    run = machine(rows=8, cells=cells)
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
