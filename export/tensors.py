"""Checkpoints as places in files: which tensor lies where; no tensor is loaded, and safetensors need no torch.

A safetensors file is `u64 length | JSON header | bytes`; the header says for every tensor its type, shape and place in
the bytes. So a checkpoint of any size is described by a few kilobytes. `export.writer` writes such files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from suite.errors import SuiteError

ITEM = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of one element, by the type names of the format."""
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin.index.json"
AGAIN = "copy or download the folder again"
BLOCK = 4 << 20


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `size` bytes from `start` in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * ITEM[self.dtype]

    def blocks(self, size: int = BLOCK) -> Iterator[memoryview]:
        """The bytes in order, at most `size` at once; each block is overwritten by the next."""
        buffer = memoryview(bytearray(min(size, self.size)))
        with self.file.open("rb") as file:
            file.seek(self.start)
            for offset in range(0, self.size, size):
                block = buffer[: min(size, self.size - offset)]
                if file.readinto(block) != len(block):
                    raise SuiteError(f"'{self.name}' ends early: the file is cut off", where=str(self.file))
                yield block


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, in the order of their bytes; raises SuiteError for a damaged file."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            size = file.stat().st_size
            if length > size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = []
        for name, spec in header.items():
            first, last = spec["data_offsets"]
            found.append(Tensor(name, spec["dtype"], tuple(spec["shape"]), file, 8 + length + first))
            if found[-1].size != last - first:
                raise ValueError(f"the bytes of '{name}' do not fit its shape")
        end = max((t.start + t.size for t in found), default=8 + length)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise SuiteError(f"not a readable safetensors file: {error}", where=str(file)) from None
    if end > size:
        raise SuiteError(f"cut off: {end - size} bytes are missing", where=str(file), hint=AGAIN)
    return {t.name: t for t in sorted(found, key=lambda t: t.start)}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, over all shards; raises SuiteError when a shard or a tensor is missing.

    Weights that PyTorch pickled are read where there are no others; that imports torch.
    """
    if is_pickled(folder):
        from export.torchbin import read_bin

        return _read(folder, PICKLED, "pytorch_model*.bin", read_bin)
    return _read(folder, INDEX, "model*.safetensors", read_header)


def is_pickled(folder: Path) -> bool:
    """Whether the only weights of a model folder are PyTorch's pickled ones."""
    return not any(folder.glob("model*.safetensors")) and any(folder.glob("pytorch_model*.bin"))


def _read(folder: Path, index_name: str, pattern: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    index = folder / index_name
    shards = _weight_map(index) if index.is_file() else {}
    files = [folder / name for name in sorted(set(shards.values()))] or sorted(folder.glob(pattern))
    if not files:
        raise SuiteError(
            "the folder has no model*.safetensors",
            where=str(folder),
            hint="weights must be in the safetensors format, or in PyTorch's pytorch_model.bin",
        )
    if gone := next((file for file in files if not file.is_file()), None):
        raise SuiteError(f"the index names '{gone.name}', which is not there", where=str(index), hint=AGAIN)
    tensors = {name: t for file in files for name, t in read(file).items()}
    if lost := sorted(shards.keys() - tensors.keys()):
        raise SuiteError(f"'{lost[0]}' is in the index and in no shard", where=str(index), hint=AGAIN)
    if shards and (more := sorted(tensors.keys() - shards.keys())):
        raise SuiteError(f"'{more[0]}' is in a shard and not in the index", where=str(index), hint=AGAIN)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in found.values()):
            raise ValueError("its weight_map must name files of the same folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SuiteError(f"not a readable index of shards: {error}", where=str(index), hint=AGAIN) from None
    return found
