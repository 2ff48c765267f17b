"""Which keys and values are kept for requests that begin alike. A plain algorithm; no torch.

Tokens are cut into blocks of `size`. The keys and values of a block depend on its tokens, on all tokens before it, and
on the weights that read them, so what is kept are trees, one for each base or adapter, and the way from a root to a
block is a beginning:

    weights ─── 0..15 ─┬─ 16..31 ─── 32..47
                       └─ 16..31

A block is found by its parent and its tokens themselves: nothing rests on hashes being different.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Keys and values of some tokens; `place` is where they lie, from 0 to the number of blocks."""

    place: int


_Key = tuple[Hashable, tuple[int, ...]]
"""The parent, a block or for the first one the weights, and the tokens."""


class Prefixes:
    """At most `blocks` blocks; those that were not used for the longest time make room for new ones.

    With each use a parent is noted after its children, so the block that is unused longest never has any.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.blocks, self.size = blocks, size
        self._kept: OrderedDict[_Key, Block] = OrderedDict()
        self._free = self._all()

    def __len__(self) -> int:
        """How many blocks are kept."""
        return len(self._kept)

    def find(self, weights: Hashable, tokens: Sequence[int]) -> list[int]:
        """The places of the longest kept beginning of `tokens`, `size` tokens each, in order."""
        keys = self._walk(weights, tokens)
        self._use(keys)
        return [self._kept[key].place for key in keys]

    def keep(self, weights: Hashable, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Keep all whole blocks of `tokens`, or as many of them as there may be blocks.

        Returns how many of them are kept already, and the places to which the following ones must be copied.
        """
        keys = self._walk(weights, tokens)
        self._use(keys)
        known = len(keys)
        last = min(len(tokens) // self.size, self.blocks)
        places = [self._place() for _ in range(known, last)]
        parent: Hashable = self._kept[keys[-1]] if keys else weights
        for index, place in enumerate(places, known):
            key = parent, self._cut(tokens, index)
            parent = self._kept[key] = Block(place)
            keys.append(key)
        self._use(keys)
        return known, places

    def clear(self) -> None:
        """Forget all blocks."""
        self._kept.clear()
        self._free = self._all()

    def _walk(self, weights: Hashable, tokens: Sequence[int]) -> list[_Key]:
        keys: list[_Key] = []
        parent = weights
        for index in range(len(tokens) // self.size if self._kept else 0):
            key = parent, self._cut(tokens, index)
            block = self._kept.get(key)
            if block is None:
                break
            keys.append(key)
            parent = block
        return keys

    def _use(self, keys: list[_Key]) -> None:
        for key in reversed(keys):
            self._kept.move_to_end(key)

    def _place(self) -> int:
        # never one of the beginning that is about to grow: those were used last, and are fewer than all blocks
        return self._free.pop() if self._free else self._kept.popitem(last=False)[1].place

    def _all(self) -> list[int]:
        return list(range(self.blocks))[::-1]

    def _cut(self, tokens: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[index * self.size : (index + 1) * self.size])
