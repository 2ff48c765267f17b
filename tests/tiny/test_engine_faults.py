"""Injected faults: what fails takes nobody with it, what is short makes requests wait, and nothing is left behind."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.generation import EngineEnded, Generation, Request
from serve.torch.engine import Engine
from tests.tiny.tiny_models import tiny_adapter, tiny_model

VOCABULARY = 512
POISON = 511
NEW = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("faults")
    base = tiny_model(root / "base")
    return {"base": base, "a": tiny_adapter(base, root / "a")}


@pytest.fixture
def engine(folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(folders["base"], {"a": folders["a"]}, max_batch=8)
    yield engine
    assert_nothing_is_left(engine)
    engine.close()


def assert_nothing_is_left(engine: Engine) -> None:
    stats = engine.stats()
    assert engine.alive
    assert (stats.running, stats.waiting, stats.cells_used) == (0, 0, 0)
    prefixes = engine.scheduler.prefixes
    places = [*prefixes._free, *(block.place for block in prefixes._kept.values())]
    assert sorted(places) == list(range(prefixes.blocks))


def failing(engine: Engine, when: Callable[[torch.Tensor], bool], error: Callable[[], Exception]) -> Any:
    """Raise `error()` in each forward pass whose token ids (B, Q) are such."""

    def hook(_: Any, __: Any, given: dict[str, Any]) -> None:
        if when(given["input_ids"]):
            raise error()

    return engine.model.register_forward_pre_hook(hook, with_kwargs=True)


def prompts(count: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, POISON) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def has_poison(ids: torch.Tensor) -> bool:
    return bool((ids == POISON).any())


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("injected: out of memory")


def test_a_failing_step_ends_its_requests_and_no_others(engine: Engine) -> None:
    asked = [Request(prompt, ("", "a")[i % 2], NEW) for i, prompt in enumerate(prompts(6))]
    wanted = [generation.new for generation in engine.generate(asked)]
    failing(engine, has_poison, lambda: ArithmeticError("injected"))
    started = threading.Event()
    others = [engine.submit(request) for request in asked[:-1]]
    others.append(engine.submit(Request(asked[-1].prompt, "a", NEW, stop=lambda _: started.set() or False)))
    assert started.wait(30)
    poisoned = engine.submit(Request([3, POISON], "", NEW)).wait(30)
    assert [other.wait(30).new for other in others] == wanted
    assert (poisoned.finish, poisoned.error) == ("error", "ArithmeticError: injected")
    stats = engine.stats()
    assert (stats.failures, stats.last_failure) == (1, "ArithmeticError: injected")
    assert stats.last_failure_time is not None
    assert 0 <= time.time() - stats.last_failure_time < 60


@pytest.mark.parametrize(
    "error", [out_of_memory, MemoryError, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_where_memory_is_short_fewer_run_at_once(engine: Engine, error: Callable[[], Exception]) -> None:
    asked = [Request(prompt, ("", "a")[i % 2], NEW, logprobs=0) for i, prompt in enumerate(prompts(20))]
    wanted = [generation.new for generation in engine.generate(asked)]
    widest: list[int] = []

    def too_many(ids: torch.Tensor) -> bool:
        widest.append(len(ids))
        return len(ids) > 3

    failing(engine, too_many, error)
    given = engine.generate(asked)
    assert [generation.new for generation in given] == wanted
    assert all(len(generation.scores) == NEW for generation in given)
    assert engine.stats().failures == 0
    assert max(widest) > 3


def test_what_does_not_fit_alone_fails_alone(engine: Engine) -> None:
    failing(engine, has_poison, out_of_memory)
    *others, large = engine.generate([*[Request(prompt, "", NEW) for prompt in prompts(9)], Request([POISON], "", NEW)])
    assert [other.finish for other in others] == ["length"] * 9
    assert large.finish == "error"
    assert "out of memory" in large.error
    assert engine.stats().failures == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_fail_alone_and_spoil_nothing(
    tmp_path: Path, folders: dict[str, Path], value: float
) -> None:
    base = tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    engine = Engine(base, {"a": folders["a"]}, max_batch=8)
    engine.scheduler.chunk = 32
    plain = [Request(prompt, ("", "a")[i % 2], NEW) for i, prompt in enumerate(prompts(6))]
    wanted = [generation.new for generation in engine.generate(plain)]
    with torch.no_grad():
        engine.model.base_model.embed_tokens.weight[POISON] = value
    begin = prompts(1, longest=400, seed=2)[0] + [3] * 80
    spoilt = [[*begin, POISON, 4, 5], [*begin, POISON] + [5] * 80, [POISON] * 40]
    for _ in range(2):  # the second time in rows that the first spoilt
        given = engine.generate([*plain[:3], *[Request(prompt, "", NEW) for prompt in spoilt], *plain[3:]])
        assert [generation.finish for generation in given[3:6]] == ["error"] * 3
        assert all("not finite" in generation.error for generation in given[3:6])
        assert [generation.new for generation in given[:3] + given[6:]] == wanted
    embedded, scored = engine.generate([Request([POISON, 4], embed="mean"), Request([POISON], prompt_logprobs=1)])
    assert (embedded.finish, scored.finish) == ("error", "error")
    again = engine.generate([Request(prompt, "", NEW) for prompt in spoilt])
    assert [generation.finish for generation in again] == ["error"] * 3
    assert all(generation.reused <= len(begin) for generation in again), "what was spoilt was kept for others"
    assert [generation.new for generation in engine.generate(plain)] == wanted
    assert engine.stats().failures == 0
    assert_nothing_is_left(engine)
    engine.close()


def test_nothing_is_kept_of_a_row_that_was_wiped_out(engine: Engine) -> None:
    gain, seen = engine.model.base_model.norm.gain, []
    kept = gain.clone()

    def spoil(token: int) -> bool:
        seen.append(token)
        if len(seen) == 45:
            gain.fill_(float("nan"))
        return False

    spoilt = engine.generate([Request([3, 4, 5], "", 100, stop=spoil)])[0]
    gain.copy_(kept)
    assert (spoilt.finish, spoilt.new) == ("error", seen)
    first, again = (engine.generate([Request(spoilt.tokens[:40], "", NEW)])[0] for _ in range(2))
    assert first.new == again.new
    assert first.new[:8] == spoilt.tokens[40:]
    assert (first.reused, again.reused) == (0, 32)


def test_a_deadline_ends_what_runs_and_what_waits(engine: Engine) -> None:
    soon = time.monotonic() + 0.3
    running = [engine.submit(Request([3, 4], "", 2000, deadline=soon)) for _ in range(8)]
    waiting = [engine.submit(Request([3, 4], "", 2000, deadline=soon)) for _ in range(3)]
    later = engine.submit(Request([3, 4], "", 4, deadline=soon + 60))
    assert [generation.wait(30).finish for generation in [*running, *waiting]] == ["timeout"] * 11
    assert all(generation.started is None for generation in waiting)
    assert later.wait(30).finish == "length"


def test_a_deadline_passes_while_an_adapter_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    read, release = engine._adapters._weights, threading.Event()
    monkeypatch.setattr(engine._adapters, "_weights", lambda folder: release.wait(60) and read(folder))
    late = engine.submit(Request([3, 4], "a", 4, deadline=time.monotonic() + 0.2))
    assert late.wait(30).finish == "timeout"
    release.set()
    assert engine.generate([Request([3, 4], "a", 4)])[0].finish == "length"


def test_times_are_in_order(engine: Engine) -> None:
    generation = engine.generate([Request([3, 4], "", 4)])[0]
    times = [generation.submitted, generation.started, generation.first_token, generation.ended]
    assert None not in times
    assert times == sorted(time for time in times if time is not None)


def test_one_who_cannot_be_told_stops_nobody(folders: dict[str, Path]) -> None:
    def broken(_: list[Generation]) -> None:
        raise RuntimeError("injected: the event loop is closed")

    engine = Engine(folders["base"], notify=broken)
    try:
        assert [generation.finish for generation in engine.generate([Request([3, 4], "", 4)] * 3)] == ["length"] * 3
        assert engine.failures == 0
    finally:
        engine.close()


class Window(threading.Condition):
    """Calls `then` once in the engine's thread, right after it let go of the lock."""

    then: Callable[[], None] | None = None

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        if threading.current_thread().name == "engine" and (then := self.then):
            self.then = None
            then()


def test_one_who_comes_and_goes_while_the_engine_looks_elsewhere(engine: Engine) -> None:
    engine.generate([Request([1, 2, 3], max_tokens=1)])
    window, old = Window(), engine._wake
    with old:  # the engine waits there, and goes on with the other
        engine._wake = window
        old.notify()
    window.then = lambda: engine.cancel(engine.submit(Request([1, 2, 3], max_tokens=4)))
    assert engine.submit(Request([1, 2, 3], max_tokens=4)).wait(60).finish == "length"
    assert window.then is None


def test_closing_ends_everything(folders: dict[str, Path]) -> None:
    engine = Engine(folders["base"], max_batch=2)
    generations = [engine.submit(Request([3, 4], "", 2000)) for _ in range(5)]
    engine.close()
    assert {generation.wait(0).finish for generation in generations} == {"cancelled"}
    assert not engine.alive
    with pytest.raises(EngineEnded, match="closed"):
        engine.submit(Request([3, 4]))


@pytest.mark.parametrize("where", ["_admit", "_collect", "_recover"])
def test_an_exception_outside_a_step_ends_all_with_its_cause(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = Engine(folders["base"], {"a": folders["a"]}, max_batch=2)
    submitted = threading.Event()

    def broken(*_: Any) -> None:
        submitted.wait(30)
        raise KeyError("injected")

    running = engine.submit(Request([3, 4], "", 2000, stop=lambda _: submitted.wait(30) and False))
    monkeypatch.setattr(engine, where, broken)
    if where == "_recover":
        failing(engine, lambda _: True, lambda: ArithmeticError("injected"))
    others = [engine.submit(Request([3, 4], name, 2000)) for name in ("", "", "a")]
    submitted.set()
    for generation in [running, *others]:
        assert (generation.wait(30).finish, generation.error) == ("error", "KeyError: 'injected'")
    assert not engine.alive
    assert engine.stats().last_failure == "KeyError: 'injected'"
    with pytest.raises(EngineEnded, match="injected"):
        engine.submit(Request([3, 4]))
    engine.close()


def test_what_is_between_two_queues_ends_too(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(folders["base"])

    def broken(_: Generation) -> None:
        raise RuntimeError("injected")

    monkeypatch.setattr(engine.scheduler, "add", broken)  # it left the inbox, and is in no other queue
    assert engine.submit(Request([3, 4])).wait(30).finish == "error"
    engine.close()


def test_chaos_leaves_nothing_behind(folders: dict[str, Path]) -> None:
    """A tiny cache; steps fail, memory runs short, clients go and deadlines pass, all at random."""
    engine = Engine(folders["base"], {"a": folders["a"]}, max_batch=32, cache_memory=0)
    rng = random.Random(0)
    system = prompts(1, longest=50)[0]
    plain = [Request(system + prompt, ("", "a")[i % 2], 140) for i, prompt in enumerate(prompts(8))]
    wanted = [generation.new for generation in engine.generate(plain)]
    hooks = [
        failing(engine, lambda ids: len(ids) > 4 and rng.random() < 0.01, out_of_memory),
        failing(engine, lambda _: rng.random() < 0.01, lambda: ArithmeticError("injected")),
    ]
    generations = []
    for number in range(80):
        deadline = time.monotonic() + rng.random() if rng.random() < 0.1 else None
        generations.append(engine.submit(replace(plain[number % 8], deadline=deadline)))
        if rng.random() < 0.2:
            engine.cancel(rng.choice(generations))
    finishes = [generation.wait(60).finish for generation in generations]
    for hook in hooks:
        hook.remove()
    assert {"length", "cancelled", "error"} <= set(finishes)
    assert engine.stats().preemptions > 0
    for number, generation in enumerate(generations):
        assert generation.finish != "length" or generation.new == wanted[number % 8]
    assert_nothing_is_left(engine)
    engine.close()
