"""Attention of one new token a row, from what the projection of queries, keys and values gives to what heads found."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from serve.torch.native.code import LEAST, Array, Code, Number, Variable
from serve.torch.native.function import Function, lanes

FIELDS = ("x", "cos", "sin", "gain", "starts", "keys", "values", "row", "head", "result", "rows")
FEW = 1 << 17
"""Products that are computed sooner than other threads begin."""

AT_ONCE = 4
"""Keys that are written out one after another in the code."""


class Heads(NamedTuple):
    """`queries` heads of `size` numbers, in as many groups as there are `keys`; scores are multiplied by `scale`.

    With a `floor`, queries and keys have a norm each, as in `serve.torch.native.pointwise`.
    """

    queries: int
    keys: int
    size: int
    scale: float
    floor: float | None


@cache
def attention(heads: Heads) -> Function:
    """For each of `rows` rows: keep its key and value behind those it has, and attend to all of them.

    x: (rows, queries + 2 keys, size); cos and sin: (positions, size / 2); gain: (queries + keys, size); starts: (rows),
    how many keys each has; keys and values: numbers from one `row` to the next, and from one `head` to the next, where
    (positions, size) lie, at least so many more than are used that all vectors end within; result: (rows, queries,
    size). The softmax is taken over blocks of keys, of which only the highest score and the sum are kept (Milakov and
    Gimelshein, arXiv:1805.02867).
    """
    return Function("attention", lanes(heads.size // 2), FIELDS, lambda code: _write(code, heads))


def _write(code: Code, heads: Heads) -> None:
    all_x, results, starts = code.floats("x"), code.floats("result"), code.wholes("starts")
    begin, end = code.share(code.field("rows") * heads.keys)
    with code.loop(end, begin) as number:
        row, group = number // heads.keys, number % heads.keys
        position = starts[row]
        x = all_x + row * ((heads.queries + 2 * heads.keys) * heads.size)
        turn = _Turn(code, heads, position)
        kept = row * code.field("row") + group * code.field("head")
        keys, values = code.floats("keys") + kept, code.floats("values") + kept
        value = x + (group + heads.queries + heads.keys) * heads.size
        _write_down(code, turn(x, group + heads.queries, 1.0), keys + position * heads.size)
        _write_down(code, _vectors(value, code, heads), values + position * heads.size)
        per_group = heads.queries // heads.keys
        queries = [turn(x, group * per_group + i, heads.scale) for i in range(per_group)]
        found = _attend(code, queries, keys, values, position + 1, heads)
        result = results + (row * heads.queries + group * per_group) * heads.size
        _write_down(code, [vector for one in found for vector in one], result)


class _Turn:
    """Heads of a row, normed and turned to its position: (a, b) becomes (a cos - b sin, b cos + a sin)."""

    def __init__(self, code: Code, heads: Heads, position: Number) -> None:
        self._code, self._heads = code, heads
        tables = [code.floats(name) + position * (heads.size // 2) for name in ("cos", "sin")]
        self._cos, self._sin = ([table[i] for i in range(0, heads.size // 2, code.lanes)] for table in tables)

    def __call__(self, x: Array, head: Number, scale: float) -> list[Number]:
        code, heads = self._code, self._heads
        vectors = _vectors(x + head * heads.size, code, heads)
        if heads.floor is not None:
            squares = sum((v * v for v in vectors[1:]), vectors[0] * vectors[0])
            factor = code.spread(code.one(1) / code.root(code.sum(squares) + code.one(heads.floor)))
            gains = _vectors(code.floats("gain") + head * heads.size, code, heads)
            vectors = [v * factor * gain for v, gain in zip(vectors, gains, strict=True)]
        half = len(vectors) // 2
        points = [*zip(vectors[:half], vectors[half:], self._cos, self._sin, strict=True)]
        turned = [a * cos - b * sin for a, b, cos, sin in points] + [b * cos + a * sin for a, b, cos, sin in points]
        return [v * code.vector(scale) for v in turned] if scale != 1 else turned


def _attend(
    code: Code, queries: list[list[Number]], keys: Array, values: Array, count: Number, heads: Heads
) -> list[list[Number]]:
    """What each of the queries that share these keys finds among the first `count`."""
    highest = [Variable(code.one(LEAST)) for _ in queries]
    totals = [Variable(code.vector(0)) for _ in queries]
    sums = [[Variable(code.vector(0)) for _ in query] for query in queries]
    rooms = [code.room() for _ in queries]
    at_once = min(AT_ONCE, code.lanes)
    with code.loop(count, step=code.lanes) as first:
        with code.loop(code.whole(code.lanes), step=at_once) as lane:
            for i in range(at_once):
                key = _vectors(keys + (first + lane + i) * heads.size, code, heads)
                for query, room in zip(queries, rooms, strict=True):
                    products = [one * other for one, other in zip(query, key, strict=True)]
                    room[lane + i] = code.sum(sum(products[1:], products[0]))
        for room, high, total, found in zip(rooms, highest, totals, sums, strict=True):
            scores = code.up_to(count - first, room[0], LEAST)
            new = code.larger(high.get(), code.highest(scores))
            change = code.exp(code.spread(high.get() - new))
            room[0] = share = code.up_to(count - first, code.exp(scores - code.spread(new)), 0)
            high.set(new)
            total.set(total.get() * change + share)
            for vector in found:
                vector.set(vector.get() * change)
        with code.loop(code.whole(code.lanes), step=at_once) as lane:
            for i in range(at_once):
                value = _vectors(values + (first + lane + i) * heads.size, code, heads)
                for room, found in zip(rooms, sums, strict=True):
                    weight = code.spread(room.single(lane + i))
                    for vector, part in zip(found, value, strict=True):
                        vector.set(vector.get() + weight * part)
    scales = [code.spread(code.one(1) / code.sum(total.get())) for total in totals]
    return [[vector.get() * scale for vector in found] for found, scale in zip(sums, scales, strict=True)]


def _vectors(array: Array, code: Code, heads: Heads) -> list[Number]:
    return [array[i] for i in range(0, heads.size, code.lanes)]


def _write_down(code: Code, vectors: list[Number], array: Array) -> None:
    for i, vector in enumerate(vectors):
        array[i * code.lanes] = vector
