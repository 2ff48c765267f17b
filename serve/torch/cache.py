"""Keys and values of all rows in one tensor per layer, behind the `Cache` interface of transformers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from transformers import Cache

from serve.torch.scheduler import Copy, Move
from serve.torch.states import LayerStates, States

BLOCK = 64
"""Rows grow by this many positions: a copy of the cache every 64 steps costs little beside reading it every step."""
VERSIONS = count()


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows have lengths of their own.

    Per layer `keys` and `values` are `(rows, kv_heads, length, head_dim)`. A forward pass works on the slice of rows
    that `begin` names; each row's new tokens go behind what it already has. What lies behind a row's end is finite
    rubbish, and masked.

    Beside them stand `blocks` kept blocks of `size` tokens, `(blocks, kv_heads, size, head_dim)` per layer: rows that
    begin with the same tokens get copies, once for each request: reading shared blocks in place would gather keys anew
    in every step. Layers that have a state instead keep it in `states`; `layers` is what models see of them.
    """

    def __init__(self, blocks: int, size: int, cells: int = 0) -> None:
        super().__init__(layers=[])
        self.states = States()
        self.layers: dict[int, LayerStates] = self.states.layers
        self._cells = cells
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.version = next(VERSIONS)
        """Another number whenever keys and values were given other memory, and in every cache."""
        self._blocks, self._size = blocks, size
        self._shape = (0, 0)
        self.first, self.last, self.length = 0, 0, 0
        self.starts: int | torch.Tensor = 0
        self.positions = torch.empty(0, dtype=torch.long)
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def fit(self, rows: int, length: int) -> None:
        """Make room for `rows` rows of `length` tokens. Where one has to grow, the other shrinks to its need.

        Rows grow to a power of two, so that they seldom do, where `cells` tokens in all allow it.
        """
        if rows > self._shape[0] or length > self._shape[1]:
            length = -(-length // BLOCK) * BLOCK
            self.version = next(VERSIONS)
            self._shape = max(rows, min(1 << (rows - 1).bit_length(), self._cells // length)), length
            for tensors in (self.keys, self.values):
                for layer, tensor in tensors.items():
                    tensors[layer] = grown = self._zeros(tensor)
                    kept = tensor[: len(grown), :, : grown.shape[2]]
                    grown[: kept.shape[0], :, : kept.shape[2]] = kept
            self.states.fit(self._shape[0])

    def begin(self, first: int, starts: Sequence[int], width: int, device: torch.device) -> None:
        """Work on rows `first` and following: row `i` reads `width` tokens from `starts[i]` on."""
        self.first, self.last, self.length = first, first + len(starts), max(starts) + width
        begins = whole(starts, device)
        self.starts = starts[0] if len({*starts}) == 1 else begins
        self.positions = begins.view(-1, 1)  # (B, Q)
        if width > 1:
            self.positions = self.positions + torch.arange(width, device=device)
        self.states.begin(first, starts)
        self._places = {}

    def arrange(self, moves: Sequence[Move], rows: int, length: int) -> None:
        """`move` and `fit`: first whichever leaves room for the other."""
        # a row may go to where there is no room yet, or come from where there will be none any more
        if rows > self._shape[0]:
            self.fit(rows, length)
            self.move(moves)
        else:
            self.move(moves)
            self.fit(rows, length)

    def move(self, moves: Sequence[Move]) -> None:
        """Copy rows to rows, as if all at once."""
        if moves:
            sources, targets, lengths = map(list, zip(*moves, strict=True))
            for tensor in (*self.keys.values(), *self.values.values()):
                used = tensor[:, :, : max(lengths)]
                used[targets] = used[sources]
            self.states.move(sources, targets)

    def keep(self, copies: Sequence[Copy]) -> None:
        """Copy blocks of rows, for other rows."""
        self._copy(copies, keep=True)

    def load(self, copies: Sequence[Copy]) -> None:
        """Copy kept blocks into rows, which `fit` made room in."""
        self._copy(copies, keep=False)

    def wipe(self, row: int) -> None:
        """Leave nothing but zeros among a row's keys and values; its states are gone when another begins there."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[row] = 0

    def clear(self) -> None:
        """Give the memory back."""
        self.version = next(VERSIONS)
        self.keys.clear()
        self.values.clear()
        self._kept.clear()
        self.states.clear()
        self._shape = (0, 0)

    def tensors(self, layer_idx: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all rows there is room for, (rows, kv_heads, length, head_dim).

        Where there are none yet they have the heads of `like` (B, kv_heads, Q, head_dim).
        """
        if layer_idx not in self.keys:
            self.version = next(VERSIONS)
            self.keys[layer_idx], self.values[layer_idx] = self._zeros(like), self._zeros(like)
        return self.keys[layer_idx], self.values[layer_idx]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new keys and values (B, kv_heads, Q, head_dim); returns all of the rows, (B, kv_heads, T, ...)."""
        keys, values = self.tensors(layer_idx, key_states)
        rows = slice(self.first, self.last)
        if isinstance(self.starts, int):
            keys[rows, :, self.starts : self.length] = key_states
            values[rows, :, self.starts : self.length] = value_states
        else:
            batch, positions = self._places_on(keys.device)
            keys[batch, :, positions] = key_states.transpose(1, 2)
            values[batch, :, positions] = value_states.transpose(1, 2)
        return keys[rows, :, : self.length], values[rows, :, : self.length]

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keep the last inputs of a convolution (B, ..., Q); returns them behind those kept before."""
        layer = self.layers.setdefault(layer_idx, LayerStates(self.states))
        return layer.update_conv(conv_states, state_idx, conv_kernel_size)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Keep a layer's state (B, ...) of the rows of this step."""
        layer = self.layers.setdefault(layer_idx, LayerStates(self.states))
        return layer.update_recurrent(recurrent_states, state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        """Whether there are states to go on from; those of rows that begin are zeros."""
        return self.states.known

    def get_query_offset(self, layer_idx: int = 0) -> int | torch.Tensor:  # noqa: ARG002
        """Where each row's new tokens start, (B,), or one number for all: the mask function adds it to the columns."""
        return self.starts

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Length and offset of the keys that `update` returns."""
        return self.length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Tokens before this step in the longest row."""
        return self.length - self.positions.shape[1]

    @property
    def token_bytes(self) -> int:
        """The memory that keys and values of one token take, in all layers that have been computed."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.itemsize for tensor in tensors)

    @property
    def is_sliding(self) -> list[bool]:
        """No layer forgets: windows are in the masks alone."""
        return [False]

    def _places_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (B, 1) and positions (B, Q) of a step on one of the devices that layers lie on, moved there once."""
        if device not in self._places:
            batch = torch.arange(self.first, self.last, device=device)[:, None]
            self._places[device] = batch, self.positions.to(device)
        return self._places[device]

    def _copy(self, copies: Sequence[Copy], keep: bool) -> None:
        if not copies:
            return
        row, number, place = torch.tensor(copies).T[..., None]  # each (N, 1)
        for layer, keys in self.keys.items():
            values = self.values[layer]
            if layer not in self._kept:
                self._kept[layer] = self._empty_blocks(keys), self._empty_blocks(values)
            heads, length = keys.shape[1:3]
            head = torch.arange(heads)
            # each block of a head is one piece of memory: copied by numbers, several times as fast as indexed
            there = ((row * heads + head) * (length // self._size) + number).flatten().to(keys.device)
            here = (place * heads + head).flatten().to(keys.device)
            for tensor, kept in zip((keys, values), self._kept[layer], strict=True):
                blocks, places = (t.view(-1, self._size * t.shape[3]) for t in (tensor, kept))
                if keep:
                    places.index_copy_(0, here, blocks.index_select(0, there))
                else:
                    blocks.index_copy_(0, there, places.index_select(0, here))

    def _empty_blocks(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(self._blocks, like.shape[1], self._size, like.shape[3])

    def _zeros(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._shape[0], like.shape[1], self._shape[1], like.shape[3])


def whole(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """As `torch.tensor` makes it, (N,), sooner: in every step there is some."""
    tensor = torch.frombuffer(array("q", numbers), dtype=torch.long)
    return tensor if device.type == "cpu" else tensor.to(device)
