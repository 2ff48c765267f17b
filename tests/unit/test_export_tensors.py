"""Safetensors headers and the streaming writer, against the reference implementation."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from export.tensors import BLOCK, copy, read_checkpoint, read_header, write_checkpoint
from suite.errors import SuiteError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_])
TENSORS = st.dictionaries(st.text("abc.é", min_size=1, max_size=6), st.tuples(SHAPES, DTYPES), min_size=1, max_size=6)


def sample(folder: Path, **shapes: tuple[int, ...]) -> Path:
    tensors = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@settings(max_examples=50)
@given(TENSORS, st.integers(1, 400))
def test_a_rewritten_checkpoint_holds_the_same_tensors(
    specs: dict[str, tuple[tuple[int, ...], type]], shard: int
) -> None:
    tensors = {
        name: (np.arange(np.prod(shape, dtype=int)) % 7).astype(dtype).reshape(shape)
        for name, (shape, dtype) in specs.items()
    }
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        save_file(tensors, Path(first) / "model.safetensors")
        total = write_checkpoint(Path(second), read_checkpoint(Path(first)).values(), copy, shard)
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
    write_checkpoint(out, read_checkpoint(tmp_path).values(), copy, 800)
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


def test_a_missing_shard_and_a_missing_tensor_are_errors(tmp_path: Path) -> None:
    sample(tmp_path, a=(4,))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
    with pytest.raises(SuiteError, match="'b' is in the index and in no shard"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(SuiteError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no model\*\.safetensors"):
        read_checkpoint(tmp_path)
