"""Low-rank changes of the rows of a batch, each with the weights of its own adapter, read where these lie.

The gathered product of Punica (arXiv:2310.18547) for a processor: tokens are in the order of their adapters, and four
of them are multiplied with four ranks at a time, whose sums stay in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from serve.torch.native.code import Array, Code, Number, Variable
from serve.torch.native.function import Function

FIELDS = ("x", "inputs", "result", "outputs", "parts", "of_adapter", "count", "order", "bounds", "adapters", "tokens")
PART = ("a", "b", "rank", "first", "width", "gain", "shift")
"""What is known of a part of a layer and an adapter: addresses, sizes and the first of its outputs."""
TILE = 4
FEW = 1 << 18
"""Products that are computed sooner than other threads begin."""


@cache
def lora(lanes: int) -> Function:
    """result = result gain + shift + x A^T B for the outputs of each of `count` parts; lanes divide all sizes.

    x: (tokens, inputs), result: (tokens, outputs), A: (rank, inputs), B: (rank, width), gain and shift: (width), or 0
    where there are none. `parts` has `PART` for each part, for the next adapter `of_adapter` numbers behind. `order`
    has the numbers of the `tokens` that have an adapter: those of the first of `adapters` from bounds[0] on, of the
    second from bounds[1].
    """
    return Function("lora", lanes, FIELDS, _write)


def _write(code: Code) -> None:
    begin, end = code.share(code.field("tokens"))
    order, bounds = code.wholes("order"), code.wholes("bounds")
    with code.loop(code.field("adapters")) as adapter:
        start, stop = code.greater(bounds[adapter], begin), code.smaller(bounds[adapter + 1], end)
        parts = code.wholes("parts") + adapter * code.field("of_adapter")
        for size in range(TILE, 0, -1):  # what is left of a tile has one of its size: weights are read once
            whole = start + code.greater(stop - start, code.whole(0)) // size * size
            with code.loop(whole, start, size) as place:
                _add(code, [order[place + i] for i in range(size)], parts)
            start = whole


def _add(code: Code, tokens: Sequence[Number], parts: Array) -> None:
    inputs = code.field("inputs")
    xs = [code.floats("x") + token * inputs for token in tokens]
    with code.loop(code.field("count")) as number:
        part = parts + number * len(PART)
        a, b, rank, first, width, gain, shift = (part[i] for i in range(len(PART)))
        results = [code.floats("result") + (token * code.field("outputs") + first) for token in tokens]
        with code.where(gain):
            gains, shifts = code.floats_at(gain), code.floats_at(shift)
            with code.loop(width, step=code.lanes) as place:
                for result in results:
                    result[place] = result[place] * gains[place] + shifts[place]
        single = rank // TILE * TILE
        for size, start, stop in ((TILE, code.whole(0), single), (1, single, rank)):
            with code.loop(stop, start, size) as index:
                low = [code.floats_at(a) + (index + i) * inputs for i in range(size)]
                high = [code.floats_at(b) + (index + i) * width for i in range(size)]
                _tile(code, xs, results, low, high, inputs, width)


def _tile(
    code: Code,
    xs: Sequence[Array],
    results: Sequence[Array],
    low: Sequence[Array],
    high: Sequence[Array],
    inputs: Number,
    width: Number,
) -> None:
    """What some ranks change for some tokens."""
    sums = [[Variable(code.vector(0)) for _ in low] for _ in xs]
    with code.loop(inputs, step=code.lanes) as place:
        rows = [row[place] for row in low]
        for x, products in zip(xs, sums, strict=True):
            values = x[place]
            for row, product in zip(rows, products, strict=True):
                product.set(product.get() + values * row)
    factors = [[code.spread(code.sum(product.get())) for product in products] for products in sums]
    with code.loop(width, step=code.lanes) as place:
        rows = [row[place] for row in high]
        for result, own in zip(results, factors, strict=True):
            values = result[place]
            for row, factor in zip(rows, own, strict=True):
                values = values + factor * row
            result[place] = values
