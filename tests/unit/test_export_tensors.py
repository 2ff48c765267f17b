"""Safetensors headers and the streaming writer, against the reference implementation."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from export.tensors import BLOCK, Tensor, read_checkpoint, read_header
from export.writer import Block, Source, write_checkpoint
from suite.errors import SuiteError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_])
TENSORS = st.dictionaries(st.text("abc.é", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES), min_size=1, max_size=6)


@contextmanager
def copying(size: int = 1 << 20) -> Iterator[Callable[[Tensor], Iterator[Block]]]:
    """Blocks of at most `size` bytes that are a tensor's own."""
    with Source() as source:

        def blocks(tensor: Tensor) -> Iterator[Block]:
            for first in range(0, tensor.size, size):
                count = min(size, tensor.size - first)
                yield Block(count, partial(source.show, tensor, first, count))

        yield blocks


def sample(folder: Path, **shapes: tuple[int, ...]) -> Path:
    tensors = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@settings(max_examples=50)
@given(TENSORS, st.integers(1, 400), st.integers(1, 3), st.integers(1, 50))
def test_a_rewritten_checkpoint_holds_the_same_tensors(
    specs: dict[str, tuple[tuple[int, ...], type]], shard: int, threads: int, block: int
) -> None:
    tensors = {
        name: (np.arange(np.prod(shape, dtype=int)) % 7).astype(dtype).reshape(shape)
        for name, (shape, dtype) in specs.items()
    }
    with TemporaryDirectory() as first, TemporaryDirectory() as second, copying(block) as blocks:
        save_file(tensors, Path(first) / "model.safetensors")
        total = write_checkpoint(Path(second), read_checkpoint(Path(first)).values(), blocks, shard, threads)
        assert total == sum(t.nbytes for t in tensors.values())
        again = {n: t for f in sorted(Path(second).glob("*.safetensors")) for n, t in load_file(f).items()}
        assert again.keys() == tensors.keys() == read_checkpoint(Path(second)).keys()
        for name, tensor in tensors.items():
            assert again[name].dtype == tensor.dtype
            np.testing.assert_array_equal(again[name], tensor)


def test_shards_stay_within_their_size_and_the_index_names_them(tmp_path: Path) -> None:
    sample(tmp_path, a=(100,), b=(100,), c=(300,), d=(10,))
    out = tmp_path / "out"
    out.mkdir()
    with copying() as blocks:
        write_checkpoint(out, read_checkpoint(tmp_path).values(), blocks, 800)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2040}
    held = {name: set(read_header(out / name)) for name in sorted(set(index["weight_map"].values()))}
    assert held == {
        "model-00001-of-00003.safetensors": {"a", "b"},
        "model-00002-of-00003.safetensors": {"c"},  # larger than a shard
        "model-00003-of-00003.safetensors": {"d"},
    }


def test_blocks_are_bounded_and_whole(tmp_path: Path) -> None:
    tensor = read_header(sample(tmp_path, a=(3 * BLOCK // 8,)))["a"]
    blocks = [len(block) for block in tensor.blocks()]
    assert blocks == [BLOCK, BLOCK // 2]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-10], "10 bytes are missing"),
        (lambda data: data[:20], "longer than the file"),
        (lambda data: b"", "not a readable safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "not a readable safetensors file"),
        (lambda data: struct.pack("<Q", 2) + b"[]" + data[10:], "not a readable safetensors file"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage, said: str) -> None:
    file = sample(tmp_path, a=(100,))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(SuiteError, match=said) as caught:
        read_checkpoint(tmp_path)
    assert caught.value.where == str(file)


def test_an_index_that_does_not_fit_its_shards_is_an_error(tmp_path: Path) -> None:
    sample(tmp_path, a=(4,), b=(4,))
    index = tmp_path / "model.safetensors.index.json"
    own = "model.safetensors"
    for weight_map, said in (
        ({"a": own, "b": own, "c": own}, "'c' is in the index and in no shard"),
        ({"a": own}, "'b' is in a shard and not in the index"),
        ({"a": own, "b": "model-2.safetensors"}, "the index names 'model-2.safetensors', which is not there"),
        ({"a": "../model.safetensors"}, "must name files of the same folder"),
        ([own], "not a readable index"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(SuiteError, match=said) as caught:
            read_checkpoint(tmp_path)
        assert caught.value.where == str(index)


class Broken(Exception):
    """What a block raises that cannot be made."""


@pytest.mark.parametrize("threads", [1, 3])
def test_nothing_is_left_of_a_checkpoint_that_fails_half_way(tmp_path: Path, threads: int) -> None:
    def blocks(tensor: Tensor) -> Iterator[Block]:
        def fail() -> memoryview:
            raise Broken

        yield Block(8, lambda: memoryview(bytes(8)))
        yield Block(tensor.size - 8, fail if tensor.name == "c" else lambda: memoryview(bytes(tensor.size - 8)))

    sample(tmp_path, a=(4,), b=(4,), c=(4,), d=(4,))
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(Broken):
        write_checkpoint(out, read_checkpoint(tmp_path).values(), blocks, 32, threads)
    assert list(out.iterdir()) == []


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no model\*\.safetensors"):
        read_checkpoint(tmp_path)
