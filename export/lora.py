"""The arithmetic of a LoRA merge, a few rows at a time: memory does not grow with the model, nor with a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import torch

from export.adapter import Edit, Lora
from export.tensors import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS_SIZE = 1 << 19
"""Elements changed at once: small enough to stay in the cache of a core."""


def load(tensor: Tensor) -> torch.Tensor:
    """The whole of a (small) tensor, as float32."""
    data = bytearray(tensor.size)
    position = 0
    for block in tensor.blocks():
        data[position : position + len(block)] = block
        position += len(block)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).reshape(tensor.shape).float()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: for blocks this small, waiting for the others takes ten times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Change:
    """`weight + scale * left @ right` for consecutive rows of a weight (rows, columns), and DoRA's norm after it."""

    def __init__(self, lora: Lora) -> None:
        a, b = load(lora.a), load(lora.b)  # (r, in), (out, r)
        self.left, self.right = (a.T, b.T.contiguous()) if lora.transposed else (b, a)
        self.scale = lora.scale
        self.magnitude = load(lora.magnitude).reshape(-1, 1) if lora.magnitude else None

    def __call__(self, weight: torch.Tensor, first: int) -> None:
        """Change `weight` (n, columns), float32, in place; its rows are `first` and those after it."""
        rows = slice(first, first + len(weight))
        weight.addmm_(self.left[rows], self.right, alpha=self.scale)
        if self.magnitude is not None:
            # arXiv:2402.09353, eq. 5: the direction is W + sBA, its length the trained magnitude of each output
            weight.mul_(self.magnitude[rows] / weight.norm(dim=1, keepdim=True))


def write(edit: Edit, out: IO[bytes]) -> None:
    """Write the merged tensor of `edit`: computed in float32, in the type of the base."""
    source, target = DTYPES[edit.source.dtype], DTYPES[edit.target.dtype]
    columns = edit.target.shape[-1] if edit.target.shape else 1
    rows = max(1, ROWS_SIZE // columns)
    change = Change(edit.lora) if edit.lora else None
    work = torch.empty(rows, columns, dtype=torch.float32)
    result = torch.empty(rows, columns, dtype=target)
    first = 0
    for block in edit.source.blocks(rows * columns * source.itemsize):
        given = torch.frombuffer(block, dtype=source).view(-1, columns)
        part, done = work[: len(given)], result[: len(given)]
        part.copy_(given)
        if change:
            change(part, first)
        done.copy_(part)
        out.write(done.view(torch.uint8).numpy().data)
        first += len(given)


def is_zero(edits: list[Edit]) -> bool:
    """Whether the adapter changes nothing: every B is still zero, as at the start of a training."""
    return all(not load(e.lora.b).any() for e in edits if e.lora) and all(e.source is e.target for e in edits)
