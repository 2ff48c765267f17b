"""What goes wrong with a merge: a clear error, nothing that looks like a model, and the base as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export.merge import Merge, merge
from export.tensors import INDEX, Tensor
from export.writer import Source
from suite.errors import SuiteError
from suite.stages import Artifact
from suite.store import Store
from tests.tiny.export_jobs import run
from tests.tiny.merge_jobs import load, random_adapter, weights
from tests.tiny.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
MERGE = """
import sys
from pathlib import Path
from export.merge import merge
base, adapter, out = map(Path, sys.argv[1:])
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("trained")
    whole = tiny_model(folder / "whole", hidden=64)
    base = shutil.copytree(whole, folder / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    load(whole).save_pretrained(base, max_shard_size="100KB")
    return base, random_adapter(whole, folder / "adapter")


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("model-*.safetensors"))


def rewrite_index(base: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def other_keys(adapter: Path, rename: Callable[[str], str]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file)


DAMAGE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a header that is none": (lambda b, a: shards(b)[1].write_bytes(b"\xff" * 64), "not a readable safetensors file"),
    "a shard cut off": (lambda b, a: cut(shards(b)[1], shards(b)[1].stat().st_size - 10), "10 bytes are missing"),
    "an empty shard": (lambda b, a: cut(shards(b)[1], 0), "not a readable safetensors file"),
    "a shard gone": (lambda b, a: shards(b)[1].unlink(), "which is not there"),
    "a tensor not in the index": (
        lambda b, a: rewrite_index(b, lambda m: m.pop("model.norm.weight")),
        "'model.norm.weight' is in a shard and not in the index",
    ),
    "a tensor in no shard": (
        lambda b, a: rewrite_index(b, lambda m: m.update({"more": shards(b)[0].name})),
        "'more' is in the index and in no shard",
    ),
    "an index that is none": (lambda b, a: (b / INDEX).write_text("{"), "not a readable index"),
    "a configuration that is none": (lambda b, a: (b / "config.json").write_text("{"), "config.json"),
    "an adapter cut off": (lambda b, a: cut(a / "adapter_model.safetensors", 5000), "bytes are missing"),
    "an adapter without weights": (lambda b, a: (a / "adapter_model.safetensors").unlink(), "not a readable"),
    "an adapter with unknown keys": (
        lambda b, a: other_keys(a, lambda name: name.replace("lora_B", "lora_C")),
        "is of no kind of LoRA known here",
    ),
    "an adapter of other layers": (
        lambda b, a: other_keys(a, lambda name: name.replace("layers.1.", "layers.7.")),
        "it changes 'model.layers.7",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_before_anything_is_written(trained: tuple[Path, Path], tmp_path: Path, damage: str) -> None:
    base, adapter = (shutil.copytree(folder, tmp_path / folder.name) for folder in trained)
    harm, said = DAMAGE[damage]
    harm(base, adapter)
    store = Store(tmp_path / "store")
    before = store.digest(base), store.digest(adapter)
    with pytest.raises(SuiteError) as caught:
        Merge(adapter="a", base="b").check(
            {"adapter": [Artifact(adapter, "adapter")], "base": [Artifact(base, "model")]}
        )
    assert said in str(caught.value)
    assert caught.value.where.startswith((str(base), str(adapter)))
    with pytest.raises(SuiteError):
        merge(base, [adapter], tmp_path / "out", 10**9)
    assert not (tmp_path / "out").exists()
    assert (store.digest(base), store.digest(adapter)) == before


def test_a_base_of_another_size_is_named(trained: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", hidden=32)
    with pytest.raises(SuiteError, match=r"'model.* is 32 x 64 there and 64 x 128 in the") as caught:
        run(Merge(adapter="a", base="b"), tmp_path / "out", adapter=trained[1], base=other)
    assert "whole" in caught.value.hint


def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(10))
    with Source() as source, pytest.raises(SuiteError, match="'w' ends early"):
        source.show(Tensor("w", "U8", (20,), file, 0), 0, 20)


def test_a_full_disk_leaves_nothing_of_a_model(trained: tuple[Path, Path], tmp_path: Path) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    merge(base, [adapter], out, 10**9)
except OSError as error:
    print(error.errno)
"""
    command = [sys.executable, "-c", MERGE + code, *map(str, trained), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "27"  # EFBIG
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full_half_way_leaves_nothing_either(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After several shards, in the middle of a tensor, on a disk that cannot tell beforehand."""
    base, adapter = trained
    before, written, write = Store(tmp_path / "store").digest(base), 0, os.pwrite
    room = sum(file.stat().st_size for file in shards(base)) // 2

    def fills_up(file: int, data: memoryview, position: int) -> int:
        nonlocal written
        if written >= room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: room - written], position)
        written += count
        return count

    def cannot_tell(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "pwrite", fills_up)
    monkeypatch.setattr(os, "posix_fallocate", cannot_tell)
    with pytest.raises(OSError, match="No space left"):
        merge(base, [adapter], tmp_path / "out", 100_000)
    assert written == room
    assert list((tmp_path / "out").iterdir()) == []
    assert Store(tmp_path / "other").digest(base) == before


@pytest.mark.parametrize(
    "command", ["merge --adapter {adapter} --base {base} --max-shard-size 100KB", "export --to hf --model {base}"]
)
def test_a_disk_that_fills_up_is_reported_by_the_command(
    trained: tuple[Path, Path], tmp_path: Path, command: str
) -> None:
    base, adapter = trained
    small, before = tmp_path / "small", Store(tmp_path / "store").digest(base)
    small.mkdir()
    inside = f"mount -t tmpfs -o size=400k none {small} && {{}}"
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside.format("true")], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    command = f"SUITE_HOME={small} {sys.executable} -m suite.cli {command.format(base=base, adapter=adapter)}"
    script = inside.format(f"{command}; code=$?; echo made: $(ls {small}/artifacts); exit $code")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("made:\n")
    assert Store(tmp_path / "other").digest(base) == before


def test_a_killed_merge_leaves_no_model_and_the_next_one_completes_it(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    code = """
import time
from export.lora.blocks import Merger
original, made = Merger._compute, []
def slow(*given):
    made.append(None)
    if len(made) == 8:
        print("half way", flush=True)
        time.sleep(60)
    return original(*given)
Merger._compute = slow
merge(base, [adapter], out, 100_000)
"""
    base, adapter = trained
    out = tmp_path / "out"
    before = Store(tmp_path / "store").digest(base)
    command = [sys.executable, "-c", MERGE + code, str(base), str(adapter), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    left = [file.name for file in out.iterdir()]
    assert left
    assert all(name.endswith(".partial") for name in left)
    merge(base, [adapter], out, 100_000)
    merge(base, [adapter], tmp_path / "clean", 100_000)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "clean").iterdir()
    }
    assert weights(out)
    assert Store(tmp_path / "other").digest(base) == before
