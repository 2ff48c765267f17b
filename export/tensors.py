"""Safetensors as a stream: headers read without torch, tensors written front to back, one at a time.

A file is `u64 length | JSON header | bytes`; the header says for every tensor its type, shape and place in the bytes.
So a checkpoint of any size is described by a few kilobytes, and a new one can be written without holding it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from suite.errors import SuiteError

ITEM = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of one element, by the type names of the format."""
INDEX = "model.safetensors.index.json"
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
        found = [
            Tensor(name, spec["dtype"], tuple(spec["shape"]), file, 8 + length + spec["data_offsets"][0])
            for name, spec in header.items()
        ]
        end = max((t.start + t.size for t in found), default=8 + length)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise SuiteError(f"not a readable safetensors file: {error}", where=str(file)) from None
    if end > size:
        raise SuiteError(f"cut off: {end - size} bytes are missing", where=str(file), hint="copy or download it again")
    return {t.name: t for t in sorted(found, key=lambda t: t.start)}


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, over all shards; raises SuiteError when a shard or a tensor is missing."""
    index = folder / INDEX
    if index.is_file():
        shards: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        shards = {}
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise SuiteError(
            "the folder has no model*.safetensors", where=str(folder), hint="weights must be in the safetensors format"
        )
    tensors = {name: t for file in files for name, t in read_header(file).items()}
    if lost := sorted(shards.keys() - tensors.keys()):
        raise SuiteError(f"'{lost[0]}' is in the index and in no shard", where=str(index))
    return tensors


Fill = Callable[[Tensor, IO[bytes]], None]
"""Writes the bytes of the tensor it is given, all of them, in order."""


def copy(tensor: Tensor, out: IO[bytes]) -> None:
    """Write the bytes of `tensor` to `out` as they are."""
    for block in tensor.blocks():
        out.write(block)


def write_checkpoint(folder: Path, tensors: Iterable[Tensor], fill: Fill, max_shard_size: int) -> int:
    """Write `tensors` (their name, type and shape) to `folder` in shards of at most `max_shard_size` bytes.

    `fill` is called once for each, in order, and its bytes go straight to the file. A tensor larger than a shard gets
    one of its own. Returns the bytes of all tensors. Files are named as Hugging Face names them.
    """
    shards = list(_shards(tensors, max_shard_size))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys((t.name for t in shard), name))
        write_file(folder / name, shard, fill)
    total = sum(t.size for shard in shards for t in shard)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return total


def write_file(path: Path, tensors: Sequence[Tensor], fill: Fill) -> None:
    """Write one safetensors file; the wider types first, so that every tensor is aligned to its element."""
    ordered = sorted(tensors, key=lambda t: -ITEM[t.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in ordered:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.size]}
        offset += t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for t in ordered:
            end = out.tell() + t.size
            fill(t, out)
            if out.tell() != end:
                raise AssertionError(f"{t.name}: {out.tell() - end:+} bytes")


def _shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    size = 0
    for t in tensors:
        if shard and size + t.size > limit:
            yield shard
            shard, size = [], 0
        shard.append(t)
        size += t.size
    yield shard
