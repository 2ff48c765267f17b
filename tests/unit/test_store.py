"""The store: complete or absent, made once, read-only, and clear about disks that refuse."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.errors import SuiteError
from suite.stages import RECORD
from suite.store import Store, combine, disk_error, make_key

RECORD_OF_TEST = {"type": "model", "name": "t"}


def child(root: Path, key: str, queue: multiprocessing.Queue[bool]) -> None:
    with Store(root).make(key, RECORD_OF_TEST) as making:
        if making:
            (making.out / "w").write_bytes(b"x" * 10)
        queue.put(making is not None)


def test_of_four_processes_one_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=child, args=(tmp_path, "k" * 32, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(queue.get(timeout=5) for _ in processes) == [False, False, False, True]


def test_an_exception_commits_nothing_and_keeps_the_partial_work(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError), store.make("e" * 32, RECORD_OF_TEST) as making:
        assert making
        (making.scratch / "checkpoint").write_text("1")
        raise RuntimeError
    assert store.get("e" * 32) is None
    with store.make("e" * 32, RECORD_OF_TEST) as making:
        assert making
        assert (making.scratch / "checkpoint").read_text() == "1"
        (making.out / "a").write_text("1")
    artifact = store.get("e" * 32)
    assert artifact
    assert artifact.digest == combine(artifact.record["files"])
    assert not list((tmp_path / "partial").iterdir())


def test_artifacts_are_read_only_and_their_digest_ignores_the_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key, name in (("a" * 32, "one"), ("b" * 32, "two")):
        with store.make(key, {**RECORD_OF_TEST, "name": name}) as making:
            assert making
            (making.out / "sub").mkdir()
            (making.out / "sub" / "w").write_text("same")
            making.metrics["x"] = 1
    one, two = store.get("a" * 32), store.get("b" * 32)
    assert one
    assert two
    assert one.digest == two.digest
    assert one.record["name"] == "one"
    assert one.metrics == {"x": 1}
    assert stat.S_IMODE((one.path / "sub" / "w").stat().st_mode) == 0o444
    assert stat.S_IMODE((one.path / RECORD).stat().st_mode) == 0o444
    assert store.find("a" * 8)[0].path == one.path


def test_force_replaces(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for text in ("old", "new"):
        with store.make("f" * 32, RECORD_OF_TEST, force=True) as making:
            assert making
            (making.out / "w").write_text(text)
    artifact = store.get("f" * 32)
    assert artifact
    assert (artifact.path / "w").read_text() == "new"


def test_a_digest_is_of_content_and_follows_changes(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = store.digest(folder)
    assert Store(tmp_path / "store").digest(folder) == first
    (folder / "a").write_text("2")
    os.utime(folder / "a", ns=(1, 1))
    assert store.digest(folder) != first
    (folder / "a").write_text("1")
    assert store.digest(folder) == first
    (folder / "a").rename(folder / "b")
    assert store.digest(folder) != first


def test_a_torn_digest_cache_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "digests.json").write_text('{"x": [1,')
    file = tmp_path / "f"
    file.write_text("1")
    assert Store(tmp_path).digest(file) == Store(tmp_path / "other").digest(file)


recipes = st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=4), st.booleans()), max_size=4)


@given(recipes, recipes)
def test_keys_see_every_value_and_no_order(a: dict[str, object], b: dict[str, object]) -> None:
    def key(recipe: dict[str, object]) -> str:
        return make_key("k", 1, recipe, {"x": ["d"]}, {"lib": "1"})

    assert key(a) == key(dict(reversed(a.items())))
    assert (key(a) == key(b)) == (json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True))
    assert key(a) != make_key("k", 2, a, {"x": ["d"]}, {"lib": "1"})
    assert key(a) != make_key("k", 1, a, {"x": ["e"]}, {"lib": "1"})
    assert key(a) != make_key("k", 1, a, {"x": ["d"]}, {"lib": "2"})


@pytest.mark.parametrize(
    ("number", "said"),
    [(28, "the disk is full"), (122, "the disk is full"), (13, "no permission"), (30, "no permission")],
)
def test_disks_that_refuse(number: int, said: str) -> None:
    error = disk_error(OSError(number, os.strerror(number), "there"), Path("x"))
    assert said in str(error)
    assert "SUITE_HOME" in str(error)


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SuiteError, match="SUITE_HOME"):
        Store(tmp_path / "file")
