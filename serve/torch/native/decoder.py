"""A step of decoding, one token of each row, as few calls: products of matrices by torch, what is between compiled.

It computes what a `Stack` does, on a processor in float32, in buffers that stay. A layer is eight calls for some thirty
operations of torch, most of which take longer to begin than to compute where rows are few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from serve.torch.cache import SlotCache
from serve.torch.layers import FusedAttention, FusedMlp, FusedNorm, FusedRotary, Projection
from serve.torch.native import attention, pointwise
from serve.torch.native.function import Call

PROBE = torch.linspace(-20, 20, 81)
"""Where an activation is compared with the one that is compiled."""


class Block(NamedTuple):
    """The parts of a layer, in the order in which they are called."""

    before_attention: FusedNorm
    attention: FusedAttention
    before_mlp: FusedNorm
    mlp: FusedMlp

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """Its linear layers, in that order."""
        return self.attention.qkv_proj, self.attention.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj


class Model(NamedTuple):
    """What is between token ids and the output layer."""

    embedding: torch.Tensor
    rotary: FusedRotary
    blocks: Sequence[Block]
    norm: FusedNorm


class Decoder:
    """Embedding, layers and last norm, for one token a row."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._embedding = model.embedding.detach()
        self._layers: list[Layer] = []
        self._whole = self._now = Buffers.of(model.blocks[0], 0)
        self._cos = self._sin = torch.empty(0, 0)
        self._fitted = self._found = (-1, -1)
        self._works: list[list[Callable[[], object]]] = []

    @staticmethod
    def fits(model: Model) -> bool:
        """Whether all of it can be computed here."""
        shapes = {tuple(linear.weight.shape for linear in block.projections) for block in model.blocks}
        tensors = [model.embedding, model.norm.gain, model.rotary.frequencies]
        tensors += [linear.weight for block in model.blocks for linear in block.projections]
        return (
            len(shapes) == 1
            and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
            and all(block.attention.softcap is None for block in model.blocks)
            and all(_is_silu(block.mlp) for block in model.blocks)
        )

    def __call__(self, ids: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """ids: (B, 1) -> normed hidden states (B, 1, hidden), in memory that the next call writes to.

        The rows are those that `cache` was told to work on; each goes on where its keys end.
        """
        if self._fitted != (len(ids), Projection.adapted):
            self._fit(len(ids))
        if self._found != (cache.first, cache.version):
            self._find(cache)
        torch.index_select(self._embedding, 0, ids.view(-1), out=self._now.x)
        self._now.starts.copy_(cache.positions)
        for work in self._works[cache.length > self._few]:
            work()
        return self._result

    def _fit(self, rows: int) -> None:
        """Compute so many rows from now on."""
        self._fitted = -1, -1  # until all is
        blocks = self._model.blocks
        if rows > len(self._whole.x):
            with torch.inference_mode(False):  # tensors for any mode
                self._whole = whole = Buffers.of(blocks[0], 1 << (rows - 1).bit_length())
            changes = [None, *[whole.change] * (len(blocks) - 1)]
            self._layers = [Layer(block, whole, change) for block, change in zip(blocks, changes, strict=True)]
            self._norm = _norm(self._model.norm, whole, whole.change)
            self._point()
            self._found = -1, -1
        self._now = now = Buffers(*(buffer[:rows] for buffer in self._whole))
        self._result = now.normed[:, None]
        self._norm.fields.rows = rows
        last = self._norm.ways[now.x.numel() > pointwise.FEW]
        self._works = [
            [*(work for layer in self._layers for work in layer.works(now, much)), last] for much in (False, True)
        ]
        self._few = attention.FEW // (2 * now.found.numel())
        self._fitted = rows, Projection.adapted

    def _find(self, cache: SlotCache) -> None:
        """Read and write the keys and values that the cache has now."""
        for layer in self._layers:
            keys, values = cache.tensors(layer.number, layer.head)
            layer.find(keys, values, cache.first)
        if keys.shape[2] > len(self._cos):
            self._extend(keys.shape[2])
        self._found = cache.first, cache.version

    def _extend(self, length: int) -> None:
        """Tables for so many positions: what they take is little beside the keys and values of as many."""
        rotary = self._model.rotary
        with torch.inference_mode(False):
            half = rotary.frequencies[: len(rotary.frequencies) // 2]
            angles = torch.arange(length)[:, None] * half
            self._cos, self._sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
        self._point()

    def _point(self) -> None:
        for layer in self._layers:
            layer.attend.fields.cos, layer.attend.fields.sin = self._cos.data_ptr(), self._sin.data_ptr()


class Buffers(NamedTuple):
    """What layers pass on, each (rows, ...)."""

    x: torch.Tensor
    normed: torch.Tensor
    heads: torch.Tensor
    found: torch.Tensor
    wide: torch.Tensor
    narrow: torch.Tensor
    change: torch.Tensor
    """What a part of a layer adds to `x`."""
    starts: torch.Tensor
    """Where each row goes on, (rows, 1)."""

    @classmethod
    def of(cls, block: Block, rows: int) -> Buffers:
        """New ones, for layers of this size."""
        qkv, o, gate_up, down = block.projections
        hidden = qkv.in_features
        sizes = hidden, hidden, qkv.out_features, o.in_features, gate_up.out_features, down.in_features, hidden
        return cls(*[torch.zeros(rows, size) for size in sizes], torch.zeros(rows, 1, dtype=torch.long))  # type: ignore[call-arg]


class Layer:
    """A layer, with its calls."""

    def __init__(self, block: Block, buffers: Buffers, change: torch.Tensor | None) -> None:
        """`change` is to be added to what comes in."""
        self.number = block.attention.layer
        queries, keys = block.attention.heads
        norm, size = block.attention.norm, block.attention.dim
        self.head = torch.empty(1, keys, 0, size)
        """A key or value of no row."""
        floor = size * norm.eps if norm else None
        heads = attention.Heads(queries, keys, size, block.attention.scaling, floor)
        self.attend = attention.attention(heads).with_(
            x=buffers.heads.data_ptr(),
            gain=norm.gain.data_ptr() if norm else 0,
            result=buffers.found.data_ptr(),
            starts=buffers.starts.data_ptr(),
        )
        swiglu = pointwise.swiglu(buffers.narrow.shape[1])
        self._activate = swiglu.with_(x=buffers.wide.data_ptr(), result=buffers.narrow.data_ptr())
        self._before = _norm(block.before_attention, buffers, change)
        self._between = _norm(block.before_mlp, buffers, buffers.change)
        self._projections = block.projections

    def works(self, now: Buffers, much: bool) -> list[Callable[[], object]]:
        """What computes `now.change` of `now.x`, for as many rows, which may have `much` to attend to."""
        for call in (self._before, self.attend, self._between, self._activate):
            call.fields.rows = len(now.x)
        large, wide = (buffer.numel() > pointwise.FEW for buffer in (now.x, now.wide))
        qkv, o, gate_up, down = self._projections
        return [
            self._before.ways[large],
            *_projecting(qkv, now.normed, now.heads),
            self.attend.ways[much],
            *_projecting(o, now.found, now.change),
            self._between.ways[large],
            *_projecting(gate_up, now.normed, now.wide),
            self._activate.ways[wide],
            *_projecting(down, now.narrow, now.change),
        ]

    def find(self, keys: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """Read these, (rows, kv_heads, length, size) of all rows, from row `first` on."""
        fields = self.attend.fields
        fields.row, fields.head, *_ = keys.stride()
        skipped = fields.row * keys.itemsize * first
        fields.keys, fields.values = keys.data_ptr() + skipped, values.data_ptr() + skipped


def _projecting(layer: Projection, x: torch.Tensor, result: torch.Tensor) -> Iterator[Callable[[], object]]:
    """What computes a projection into memory that is there, with what adapters change."""
    weight = layer.weight.detach().T
    if layer.bias is None:
        yield partial(torch.mm, x, weight, out=result)
    else:
        yield partial(torch.addmm, layer.bias, x, weight, out=result)
    if layer.adapting is not None:
        yield layer.adapting.at(x, result)


def _norm(norm: FusedNorm, buffers: Buffers, change: torch.Tensor | None) -> Call:
    """Makes `buffers.normed` of `buffers.x`, to which `change` is added first."""
    width = buffers.x.shape[1]
    return pointwise.norm(width, width * norm.eps, change is not None).with_(
        x=buffers.x.data_ptr(),
        change=0 if change is None else change.data_ptr(),
        gain=norm.gain.data_ptr(),
        result=buffers.normed.data_ptr(),
    )


def _is_silu(mlp: FusedMlp) -> bool:
    wanted = torch.nn.functional.silu(PROBE)
    return bool(torch.allclose(mlp.act_fn(PROBE), wanted)) and mlp.sizes[0] == mlp.sizes[1]
