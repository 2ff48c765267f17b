"""The arithmetic of a LoRA merge, a few rows at a time: memory does not grow with the model, nor with a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import torch

from export.lora.adapter import Lora, Patch
from export.lora.fit import Edit
from export.tensors import ITEM, Tensor
from export.writer import Source

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TILE_SIZE = 1 << 17
"""Elements changed at once: with all that is computed of them they stay in the cache of a core."""
FEWEST_ROWS = 8
"""Rows changed at once, at least: a product of one row is summed in another order than one of several."""
Load = Callable[[Tensor], torch.Tensor]


class LowRank:
    """Adds `scale * left @ right` to consecutive rows of a weight (rows, columns); for DoRA, gives them their length.

    Rounds as peft does: the product, then its multiple, then the sum, each in float32.
    """

    def __init__(self, lora: Lora, weight: Tensor, source: Source, load: Load) -> None:
        a, b = factors(lora, load)
        self.left, self.right = (a.T, b.T.contiguous()) if lora.transposed else (b, a)
        self.scale = lora.scale
        self.magnitude = load(lora.magnitude).reshape(-1, 1) if lora.magnitude else None
        self.column_factor: torch.Tensor | None = None
        if self.magnitude is not None and lora.transposed:
            squares = torch.zeros(weight.shape[-1], dtype=torch.float64)
            for first, rows in read_rows(weight, source):
                squares += self.add(rows, first).double().square_().sum(0)
            self.column_factor = self.magnitude.T / squares.sqrt().float()

    def add(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """`weight` (n, columns) plus the change, in place."""
        return weight.add_(self.change(first, len(weight)))

    def change(self, first: int, count: int) -> torch.Tensor:
        """The change of `count` rows from `first`: (count, columns), without DoRA's length."""
        return torch.mm(self.left[first : first + count], self.right).mul_(self.scale)

    def __call__(self, weight: torch.Tensor, first: int) -> None:
        """Change `weight` (n, columns), float32, in place; its rows are `first` and those after it."""
        self.add(weight, first)
        if self.column_factor is not None:
            weight.mul_(self.column_factor)
        elif self.magnitude is not None:
            # arXiv:2402.09353, eq. 5: the direction is W + sBA, its length the trained magnitude of each output
            weight.mul_(self.magnitude[first : first + len(weight)] / weight.norm(dim=1, keepdim=True))


class Stacked:
    """Adds its change to each of the experts in one weight (experts x rows, columns); they share a pair of factors."""

    def __init__(self, lora: Lora, weight: Tensor, source: Source, load: Load) -> None:
        count = lora.expert[1]
        self.experts = [LowRank(replace(lora, expert=(i, count)), weight, source, load) for i in range(count)]
        self.rows = weight.shape[0] // count

    def __call__(self, weight: torch.Tensor, first: int) -> None:
        """Change `weight` (n, columns), float32, in place; its rows are `first` and those after it."""
        done = 0
        while done < len(weight):
            expert, row = divmod(first + done, self.rows)
            part = weight[done : done + self.rows - row]
            self.experts[expert](part, row)
            done += len(part)


class Change:
    """All that one adapter does to consecutive rows of a weight."""

    def __init__(self, patch: Patch, weight: Tensor, source: Source, load: Load) -> None:
        self.whole, self.source = patch.whole, source
        kind = Stacked if patch.lora and patch.lora.stacked else LowRank
        self.low_rank = kind(patch.lora, patch.whole or weight, source, load) if patch.lora else None
        self.bias = load(patch.bias[0]).mul(patch.bias[1]).reshape(-1, 1) if patch.bias else None
        self.tokens = torch.tensor(patch.tokens.indices) if patch.tokens else None
        self.values = load(patch.tokens.values) if patch.tokens else torch.empty(0)
        alone = patch.lora and patch == Patch(lora=patch.lora) and not patch.lora.magnitude
        self.plain = self.low_rank if alone and isinstance(self.low_rank, LowRank) else None

    def __call__(self, weight: torch.Tensor, first: int) -> None:
        """Change `weight` (n, columns), float32, in place; its rows are `first` and those after it."""
        if self.whole:
            weight.copy_(rows_of(self.whole, first, len(weight), self.source))
        if self.low_rank:
            self.low_rank(weight, first)
        if self.bias is not None:
            weight.add_(self.bias[first : first + len(weight)])
        if self.tokens is not None:
            inside = (self.tokens >= first) & (self.tokens < first + len(weight))
            weight[self.tokens[inside] - first] = self.values[inside]

    def delta(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """What is added to `weight` (n, columns); it stays as it is."""
        if self.plain:
            return self.plain.change(first, len(weight))
        changed = weight.clone()
        self(changed, first)
        return changed.sub_(weight)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let each operation compute on one thread: blocks this small gain nothing from more, and wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spans(shape: tuple[int, ...], size: int) -> Iterator[tuple[int, int]]:
    """The rows of a weight in parts of about the same size, and of about `size` elements at most."""
    rows, columns = matrix(shape)
    count = max(1, min(rows // FEWEST_ROWS, -(-rows * columns // size)))
    for i in range(count):
        yield rows * i // count, rows * (i + 1) // count


def read_rows(tensor: Tensor, source: Source) -> Iterator[tuple[int, torch.Tensor]]:
    """All rows of a tensor as float32, a block at a time, with the number of its first."""
    for first, last in spans(tensor.shape, TILE_SIZE):
        yield first, rows_of(tensor, first, last - first, source)


def shown(tensor: Tensor, first: int, count: int, source: Source) -> torch.Tensor:
    """`count` rows of a tensor from `first` where they lie: (count, columns), in its own type; not to be changed."""
    columns = matrix(tensor.shape)[1]
    row = columns * ITEM[tensor.dtype]
    data = source.show(tensor, first * row, count * row)
    return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(count, columns)


def load(tensor: Tensor, source: Source) -> torch.Tensor:
    """The whole of a (small) tensor, as float32; not to be changed: it may be where it lies."""
    return shown(tensor, 0, matrix(tensor.shape)[0], source).float().view(tensor.shape)


def factors(lora: Lora, load: Load) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r), as float32; of a pair that experts share, the part of one of them."""
    index, count = lora.expert
    b = load(lora.b).reshape(lora.b.shape[0], -1, count)[:, :, index]
    a = load(lora.a).reshape(count, lora.a.shape[0] // count, -1)[index]
    return a, (b[slice(*lora.rows)] if lora.rows else b).contiguous()


def is_zero(edits: Sequence[Edit], source: Source) -> bool:
    """Whether the adapters change nothing: every B is still zero, as at the start of a training."""
    patches = [patch for e in edits for _, patch in e.patches]
    if any(e.changed and not e.patches for e in edits) or any(p.whole or p.bias or p.tokens for p in patches):
        return False
    return all(not load(p.lora.b, source).any() for p in patches if p.lora)


def rows_of(tensor: Tensor, first: int, count: int, source: Source) -> torch.Tensor:
    """`count` rows of a tensor from `first`: (count, columns), float32."""
    return shown(tensor, first, count, source).to(torch.float32, copy=True)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A weight's shape as (rows, columns); the dimensions of a convolution's kernel count as columns."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(torch.uint8).view(-1).numpy().data
