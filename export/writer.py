"""Writes safetensors front to back, once, in blocks that a few threads compute and write: no tensor is ever held.

Reading, arithmetic and writing all leave Python's lock, so that two cores are busy where copying uses one. A block's
place is known before it is computed: the bytes do not depend on the number of threads, or on which was faster.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from export.tensors import INDEX, ITEM, Tensor
from suite.errors import SuiteError

PARTIAL = ".partial"
"""Ending of a file that is being written; it gets its name when the whole checkpoint is there."""


class Block(NamedTuple):
    """`size` bytes; `make` gives them, in a writing thread, and may overwrite what it gave there before."""

    size: int
    make: Callable[[], memoryview]


Blocks = Callable[[Tensor], Iterator[Block]]
"""The bytes of a tensor, in order; consumed by one thread at a time."""


class Source:
    """Shows tensors where they lie, each file opened once; safe to use from several threads. Close it at the end.

    Bytes are not read but mapped: whoever looks at them finds them in the kernel's memory.
    """

    def __init__(self) -> None:
        self.files: dict[Path, int] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)

    def show(self, tensor: Tensor, offset: int, size: int) -> memoryview:
        """`size` bytes of `tensor` from `offset`, as long as they are held; they count as memory of this process.

        Raises SuiteError where the file ends early; one that is made shorter later kills the process.
        """
        file = self.files.get(tensor.file) or self._open(tensor.file)
        start = tensor.start + offset
        before = start % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(file, before + size, mmap.MAP_PRIVATE, offset=start - before)
        except ValueError:
            raise SuiteError(f"'{tensor.name}' ends early: the file is cut off", where=str(tensor.file)) from None
        return memoryview(pages)[before:]

    def _open(self, file: Path) -> int:
        with self.lock:
            if file not in self.files:
                self.files[file] = os.open(file, os.O_RDONLY)
            return self.files[file]


def write_checkpoint(
    folder: Path, tensors: Iterable[Tensor], blocks: Blocks, max_shard_size: int, threads: int = 1
) -> int:
    """Write `tensors` (their name, type and shape) to `folder` in shards of at most `max_shard_size` bytes.

    A tensor larger than a shard gets one of its own. Files are named as Hugging Face names them, and only when all of
    them are complete: after an error nothing is left, and after a crash nothing that looks like a checkpoint. Returns
    the bytes of all tensors.
    """
    shards = list(_shards(tensors, max_shard_size))
    weight_map: dict[str, str] = {}
    names = []
    try:
        for i, shard in enumerate(shards, 1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
            names.append(name)
            weight_map.update(dict.fromkeys((t.name for t in shard), name))
            write_file(folder / (name + PARTIAL), shard, blocks, threads)
    except BaseException:
        for name in names:
            (folder / (name + PARTIAL)).unlink(missing_ok=True)
        raise
    total = sum(t.size for shard in shards for t in shard)
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for name in names:
        (folder / (name + PARTIAL)).rename(folder / name)
    return total


def write_file(path: Path, tensors: Sequence[Tensor], blocks: Blocks, threads: int) -> None:
    """Write one safetensors file; the wider types first, so that every tensor is aligned to its element."""
    ordered = sorted(tensors, key=lambda t: -ITEM[t.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in ordered:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, offset + t.size]}
        offset += t.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = struct.pack("<Q", len(text)) + text
    with path.open("wb", buffering=0) as out:
        _reserve(out.fileno(), len(start) + offset)
        _write_at(out.fileno(), memoryview(start), 0)
        _pour(out.fileno(), _placed(ordered, blocks, len(start)), threads)


def _placed(tensors: Sequence[Tensor], blocks: Blocks, position: int) -> Iterator[tuple[int, Block]]:
    for t in tensors:
        end = position + t.size
        for block in blocks(t):
            yield position, block
            position += block.size
        if position != end:
            raise AssertionError(f"{t.name}: {position - end:+} bytes")


def _pour(file: int, placed: Iterator[tuple[int, Block]], threads: int) -> None:
    """Let each thread take the next block, make it and write it, until none is left or one fails."""
    # Linux lets one thread at a time write to a file, and spins where two want to: several times slower than waiting
    taking, writing, stop = threading.Lock(), threading.Lock(), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                with taking:
                    taken = next(placed, None)
                if taken is None:
                    return
                position, block = taken
                data = block.make()
                with writing:
                    _write_at(file, data, position)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()


def _write_at(file: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(file, data, position)
        data, position = data[count:], position + count


def _reserve(file: int, size: int) -> None:
    """Take the space on the disk before anything is computed: a full disk shows at once, and writing is faster."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


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
