"""Which width for which group of layers: sizes by formula, and every mix that no other beats in both size and KL."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from export.quantizers.layers import IN_A_BLOCK, WHOLE, Shape

SHALLOW = 8
"""Models of at most this many blocks have a group for each; deeper ones for each third of their depth."""
TOGETHER: dict[str, tuple[tuple[int, ...], ...]] = {"gptq": ((2, 3, 4, 8),), "awq": ((4,),), "bnb": ((4,), (8,))}
"""The widths that one checkpoint of a method can mix, with each other and with layers that are not quantized."""
BNB_BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4-bit form."""


@dataclass(frozen=True)
class Option:
    """A width for one group: the bytes of its layers, and the KL (nats a token) of the model with it alone rounded."""

    bits: int
    bytes: int
    kl: float


@dataclass(frozen=True)
class Mix:
    """A width for every group, in their order; bytes and KL are the sums."""

    bits: tuple[int, ...] = ()
    bytes: int = 0
    kl: float = 0.0

    def __add__(self, option: Option) -> Mix:
        return Mix((*self.bits, option.bits), self.bytes + option.bytes, self.kl + option.kl)


def families(methods: Sequence[str], bits: Collection[int]) -> list[tuple[str, tuple[int, ...]]]:
    """The kinds of checkpoints that `methods` can write of these widths: method, and what its layers may have."""
    found = [(method, {*widths} & {*bits}) for method in methods for widths in TOGETHER[method]]
    return [(method, (*sorted(widths), WHOLE)) for method, widths in found if widths]


def front(groups: Sequence[Sequence[Option]]) -> list[Mix]:
    """The mixes that no other beats in both bytes and KL, smallest first: the multiple-choice knapsack, for any limit.

    Exact: a partial mix that another beats is part of no better whole one, so groups are added one by one.
    """
    mixes = [Mix()]
    for options in groups:
        grown = sorted((mix + option for mix in mixes for option in options), key=lambda m: (m.bytes, m.kl))
        mixes = []
        for mix in grown:
            if not mixes or mix.kl < mixes[-1].kl:
                mixes.append(mix)
    return mixes


def group(layers: Collection[str]) -> dict[str, list[str]]:
    """Attention and MLP layers apart, of each block or third of the depth, by a name such as `0-9 attention`."""
    numbers = {name: int(match[0].strip(".")) for name in layers if (match := IN_A_BLOCK.search(name))}
    depth = max(numbers.values()) + 1
    found: dict[str, list[str]] = {}
    for name, number in numbers.items():
        part = "attention" if re.search(r"\.\w*att\w*\.", name) else "mlp"
        if depth <= SHALLOW:
            where = str(number)
        else:
            third = 3 * number // depth
            first, last = -(-third * depth // 3), -(-(third + 1) * depth // 3) - 1
            where = f"{first}-{last}"
        found.setdefault(f"{where} {part}", []).append(name)
    return dict(sorted(found.items(), key=lambda entry: (int(re.split(r"\D", entry[0])[0]), entry[0])))


def layer_bytes(method: str, shape: Shape, bits: int, group_size: int) -> int:
    """Bytes that a quantized layer of (outputs, inputs) takes in the checkpoint, with its scales and zeros."""
    outputs, inputs = shape
    packed = outputs * inputs * bits // 8
    if method == "bnb":
        return packed + 4 * (outputs if bits == 8 else -(-outputs * inputs // BNB_BLOCK))
    groups = -(-inputs // group_size) if group_size > 0 else 1
    scales_and_zeros = groups * outputs * (16 + bits) // 8
    return packed + scales_and_zeros + (4 * inputs if method == "gptq" else 0)
