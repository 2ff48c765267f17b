"""Adapters come and go while the engine runs: from disk, under a memory budget, replaced, unloaded, broken, deleted."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.generation import Generation, Request
from serve.torch.engine import Engine
from suite.errors import SuiteError
from tests.tiny.tiny_models import tiny_adapter, tiny_model

NEW = 6
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture(scope="module")
def seed_adapter(base: Path) -> Path:
    return tiny_adapter(base, base.parent / "seed", rank=2)


@pytest.fixture
def engine(base: Path) -> Iterator[Engine]:
    engine = Engine(base, max_batch=8, prefix_cache=False)
    yield engine
    engine.close()


def variant(seed_adapter: Path, folder: Path, number: int) -> Path:
    """An adapter of the same shape with other weights; quicker than peft."""
    shutil.copytree(seed_adapter, folder, dirs_exist_ok=True)
    rng = torch.Generator().manual_seed(number)
    weights = load_file(seed_adapter / "adapter_model.safetensors")
    made = {n: 0.3 * torch.randn(t.shape, generator=rng) for n, t in weights.items()}
    save_file(made, folder / "adapter_model.safetensors")
    return folder


def ask(engine: Engine, *names: str, new: int = NEW) -> list[list[int]]:
    """The answers of these adapters to one prompt, asked at once."""
    found = engine.generate([Request(PROMPT, name, new) for name in names])
    assert [(g.finish, g.error) for g in found] == [("length", "")] * len(names)
    return [g.new for g in found]


def emptied(engine: Engine) -> bool:
    """Whether its memory for adapters is empty soon, with nothing asked of it."""
    deadline = time.monotonic() + 30
    while engine.stats().adapters.used and time.monotonic() < deadline:
        time.sleep(0.01)
    return (engine.stats().adapters.resident, engine.stats().adapters.used) == (0, 0)


def stalled(engine: Engine, name: str) -> tuple[Generation, threading.Event]:
    """A generation that has begun, and the event that lets it go on to its end."""
    began, go_on = threading.Event(), threading.Event()

    def stop(_: int) -> bool:
        began.set()
        go_on.wait(30)
        return False

    generation = engine.submit(Request(PROMPT, name, NEW, stop=stop))
    assert began.wait(30)
    return generation, go_on


def test_a_name_is_given_to_another_adapter_while_it_runs(engine: Engine, seed_adapter: Path, tmp_path: Path) -> None:
    old, new = (variant(seed_adapter, tmp_path / str(i), i) for i in (1, 2))
    engine.load_adapter("a", old)
    [first] = ask(engine, "a")
    running, go_on = stalled(engine, "a")
    engine.load_adapter("a", new)
    later = engine.submit(Request(PROMPT, "a", NEW))
    go_on.set()
    assert running.wait(30).new == first
    second = later.wait(30).new
    assert second != first
    engine.load_adapter("fresh", new)
    assert ask(engine, "fresh", "a", "") == [second, second, ask(engine, "")[0]]


def test_an_adapter_that_is_unloaded_while_it_runs_ends_its_work(
    engine: Engine, seed_adapter: Path, tmp_path: Path
) -> None:
    engine.load_adapter("a", variant(seed_adapter, tmp_path / "a", 1))
    [wanted] = ask(engine, "a")
    running, go_on = stalled(engine, "a")
    engine.unload_adapter("a")
    with pytest.raises(SuiteError, match="unknown adapter 'a'"):
        engine.submit(Request(PROMPT, "a"))
    assert engine.adapter_names == []
    go_on.set()
    assert running.wait(30).new == wanted
    assert emptied(engine)
    with pytest.raises(SuiteError, match="unknown adapter 'a'"):
        engine.unload_adapter("a")


def test_the_memory_of_slots_is_told(engine: Engine, base: Path, seed_adapter: Path) -> None:
    engine.load_adapter("a", seed_adapter)
    ask(engine, "a")
    assert engine.stats().adapter_slots == 0, "weights are read where they lie"
    other = Engine(base, dtype="bfloat16", max_batch=8)
    try:
        ask(other, "")
        assert other.stats().adapter_slots == 0
        other.load_adapter("a", seed_adapter)
        ask(other, "a")
        assert other.stats().adapter_slots >= other.stats().adapters.used > 0
        ask(other, "a", "a", "", "a")
        layers = other._adapters.lora._layers.values()
        assert other.stats().adapter_slots == sum(layer._a.nbytes + layer._b.nbytes for layer in layers)
    finally:
        other.close()


def test_an_idle_engine_holds_nothing_of_what_was_unloaded(engine: Engine, seed_adapter: Path) -> None:
    for name in ("a", "b"):
        engine.load_adapter(name, seed_adapter)
        ask(engine, name, new=1)
    resident = engine._adapters._pool.resident.values()
    held = [weakref.ref(tensor) for weights in resident for pair in weights.layers.values() for tensor in pair]
    engine.load_adapter("b", seed_adapter)
    engine.unload_adapter("a")
    assert emptied(engine)
    assert not any(reference() is not None for reference in held)


def test_two_hundred_adapters_in_the_memory_of_eight(base: Path, seed_adapter: Path, tmp_path: Path) -> None:
    folders = {f"a{i}": variant(seed_adapter, tmp_path / f"a{i}", i) for i in range(200)}
    size = sum(t.nbytes for t in load_file(seed_adapter / "adapter_model.safetensors").values())
    names = [f"a{int(200 * (i / 300) ** 3)}" for i in range(300)]  # few are asked for often, many once
    names = names[::7] + names[1::3] + [""] * 5 + names[2::5]
    roomy, narrow = Engine(base, folders, max_batch=16), Engine(base, folders, max_batch=16, adapter_memory=8 * size)
    try:
        wanted = ask(roomy, *names, new=3)
        most = 0

        def watch(generations: list[Generation]) -> None:
            nonlocal most
            most = max(most, narrow.stats().adapters.used)

        narrow._notify = watch
        assert ask(narrow, *names, new=3) == wanted
        stats, all_of_them = narrow.stats().adapters, roomy.stats().adapters
    finally:
        roomy.close()
        narrow.close()
    assert most <= stats.budget == 8 * size
    assert stats.evictions > 50
    assert (all_of_them.evictions, all_of_them.used) == (0, all_of_them.loads * size)
    assert stats.hits + stats.misses == len(names) - 5


def test_what_is_broken_or_for_another_base_is_refused_before_it_is_named(
    engine: Engine, base: Path, seed_adapter: Path, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", hidden=64)
    cut = variant(seed_adapter, tmp_path / "cut", 1)
    file = cut / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    rubbish = variant(seed_adapter, tmp_path / "rubbish", 1)
    (rubbish / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    for folder, reason in [
        (tmp_path / "nowhere", "no such folder"),
        (tiny_adapter(other, tmp_path / "foreign"), "another base"),
        (cut, "1 bytes are missing"),
        (rubbish, "not a safetensors file"),
    ]:
        with pytest.raises(SuiteError, match=reason):
            engine.load_adapter("a", folder)
    assert engine.adapter_names == []
    small = Engine(base, adapter_memory=1000)
    try:
        with pytest.raises(SuiteError, match="more than the"):
            small.load_adapter("a", seed_adapter)
    finally:
        small.close()


@pytest.mark.parametrize("fault", ["deleted", "replaced", "cut off"])
def test_a_file_that_is_lost_fails_only_who_needs_it(
    engine: Engine, seed_adapter: Path, tmp_path: Path, fault: str
) -> None:
    lost, kept = (variant(seed_adapter, tmp_path / name, i) for i, name in enumerate(("lost", "kept")))
    file = lost / "adapter_model.safetensors"
    engine.load_adapter("lost", lost)
    engine.load_adapter("kept", kept)
    if fault == "deleted":
        file.unlink()
    elif fault == "replaced":
        variant(seed_adapter, lost, 7)
    else:
        file.write_bytes(file.read_bytes()[:-8])
    first, second, third = engine.generate([Request(PROMPT, name, NEW) for name in ("lost", "kept", "")])
    assert (first.finish, second.finish, third.finish) == ("error", "length", "length")
    assert ("missing" if fault == "deleted" else "changed on disk") in first.error
    assert first.unreadable
    assert str(tmp_path) not in first.error
    engine.load_adapter("lost", variant(seed_adapter, lost, 8))
    assert ask(engine, "lost")[0] != ask(engine, "kept")[0]
    assert engine.stats().adapters.failures == 1
    assert engine.alive


def test_an_error_of_the_disk_names_no_place(
    engine: Engine, seed_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.load_adapter("a", seed_adapter)
    monkeypatch.setattr("serve.torch.adapters.safe_open", lambda path, *_, **__: next(Path(path).iterdir()))
    failed = engine.submit(Request(PROMPT, "a", NEW)).wait(30)
    assert (failed.unreadable, failed.error) == (True, "cannot be read: Not a directory")


def test_an_adapter_in_memory_needs_no_file(engine: Engine, seed_adapter: Path, tmp_path: Path) -> None:
    engine.load_adapter("a", variant(seed_adapter, tmp_path / "a", 1))
    before = ask(engine, "a")
    shutil.rmtree(tmp_path / "a")
    assert ask(engine, "a") == before


def test_loading_and_unloading_under_load_disturbs_nobody(base: Path, seed_adapter: Path, tmp_path: Path) -> None:
    folders = {f"a{i}": variant(seed_adapter, tmp_path / f"a{i}", i) for i in range(6)}
    size = sum(t.nbytes for t in load_file(seed_adapter / "adapter_model.safetensors").values())
    engine = Engine(base, {"a0": folders["a0"]}, max_batch=8, adapter_memory=3 * size)
    try:
        for name in folders:
            engine.load_adapter(name, folders[name])
        names = ["", *folders]
        wanted = dict(zip(names, ask(engine, *names), strict=True))
        busy = [engine.submit(Request(PROMPT, names[i % 7], NEW)) for i in range(140)]
        for i in range(40):
            name = f"a{i % 6}"
            if i % 3 == 0 and name in engine.adapter_names:
                engine.unload_adapter(name)
            else:
                engine.load_adapter(name, folders[name])
            time.sleep(0.005)
        for i, generation in enumerate(busy):
            assert generation.wait(60).new == wanted[names[i % 7]], generation.error
        gone = [engine.submit(Request(PROMPT, name, 200)) for name in engine.adapter_names * 4]
        for generation in gone:
            engine.cancel(generation)
        assert {generation.wait(30).finish for generation in gone} == {"cancelled"}
        for name in engine.adapter_names:
            engine.unload_adapter(name)
        assert emptied(engine)
        assert engine.load == (0, 0)
    finally:
        engine.close()


def test_closing_ends_who_waits_for_a_disk(base: Path, seed_adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(base, {"a": seed_adapter})
    never = threading.Event()
    monkeypatch.setattr(engine._adapters, "_weights", lambda _: never.wait(30))
    waiting = engine.submit(Request(PROMPT, "a", NEW))
    due = engine.submit(Request(PROMPT, "a", NEW, deadline=time.monotonic() + 0.05))
    assert ask(engine, "")[0], "the base waits for no disk"
    assert engine.load == (0, 2) or due.finish
    time.sleep(0.06)
    ask(engine, "")
    assert due.wait(30).finish == "timeout"
    engine.close()
    never.set()
    assert waiting.finish == "cancelled"
