"""What layers with a state keep of each row: of one size, however much the row has read.

State-space layers (Mamba, arXiv:2312.00752), linear attention and short convolutions keep no keys and values, but the
last inputs of a convolution, a sum over all that was read, or both. Transformers' models call them conv and recurrent
states, change them in place while decoding, and go on from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


class States:
    """The states of all rows, by layer, each tensor (rows, ...); a step works on a slice of the rows.

    A row that is read from its first token on begins with zeros: that is what a model begins with by itself, and so
    rows that begin and rows that go on are computed together.
    """

    def __init__(self) -> None:
        self.layers: dict[int, LayerStates] = {}
        self.rows = slice(0, 0)
        """Those of the step."""
        self.count = 0
        """How many rows there is room for."""
        self.known = False
        """Whether there were states when the step began; a model asks for none before it has given some."""

    def __bool__(self) -> bool:
        return bool(self.layers)

    def fit(self, rows: int) -> None:
        """Make room for `rows` rows; of those there are, the first stay."""
        if rows != self.count:
            self.count = rows
            for tensors, number in self._places():
                tensor = tensors[number]
                tensors[number] = grown = tensor.new_zeros(rows, *tensor.shape[1:])
                grown[: len(tensor)] = tensor[:rows]

    def begin(self, first: int, starts: Sequence[int]) -> None:
        """Work on rows `first` and following, of which `starts` tokens were read; where there are none, forget all."""
        self.rows, self.known = slice(first, first + len(starts)), bool(self.layers)
        if self.known and (fresh := [row for row, start in enumerate(starts, first) if start == 0]):
            for tensors, number in self._places():
                tensors[number][fresh] = 0

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows to rows, as if all at once."""
        for tensors, number in self._places():
            tensors[number][targets] = tensors[number][sources]

    def clear(self) -> None:
        """Give the memory back."""
        self.layers.clear()
        self.count = 0

    @property
    def row_bytes(self) -> int:
        """The memory that a row takes."""
        tensors = [tensors[number] for tensors, number in self._places()]
        return sum(tensor[:1].numel() * tensor.itemsize for tensor in tensors)

    def _places(self) -> Iterator[tuple[dict[int, torch.Tensor], int]]:
        for layer in self.layers.values():
            for tensors in (layer.conv, layer.recurrent):
                for number in tensors:
                    yield tensors, number


class LayerStates:
    """One layer's, with the attributes that models know of transformers' `LinearAttentionLayer`."""

    record_past = False
    """Whether to keep what falls out of a convolution, to go back to: rows only go on."""

    def __init__(self, states: States) -> None:
        self._states = states
        self.conv: dict[int, torch.Tensor] = {}
        self.recurrent: dict[int, torch.Tensor] = {}

    @property
    def conv_states(self) -> dict[int, torch.Tensor]:
        """The last inputs (B, ..., kernel size) of each convolution, by its number; of the rows of the step."""
        return {number: tensor[self._states.rows] for number, tensor in self.conv.items()}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor]:
        """What is summed up, (B, ...)."""
        return {number: tensor[self._states.rows] for number, tensor in self.recurrent.items()}

    def update_conv(self, new: torch.Tensor, number: int, size: int | None) -> torch.Tensor:
        """Keep the last `size` of `new` (B, ..., Q); returns them behind what was kept, (B, ..., size + Q)."""
        if number not in self.conv:
            self.conv[number] = new.new_zeros(self._states.count, *new.shape[1:-1], size or new.shape[-1])
        kept = self.conv[number][self._states.rows]
        both = torch.cat((kept, new), -1)
        kept.copy_(both[..., -kept.shape[-1] :])
        return both

    def update_recurrent(self, new: torch.Tensor, number: int) -> torch.Tensor:
        """Keep `new`, (B, ...)."""
        if number not in self.recurrent:
            self.recurrent[number] = new.new_zeros(self._states.count, *new.shape[1:])
        return self.recurrent[number][self._states.rows].copy_(new)
