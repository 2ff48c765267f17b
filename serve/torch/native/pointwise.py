"""Norms and activations: every number is read and written once."""

from __future__ import annotations

from functools import cache

from serve.torch.native.code import Code, Variable
from serve.torch.native.function import Function, lanes

FEW = 1 << 14
"""Numbers that are computed sooner than other threads begin."""


@cache
def norm(width: int, floor: float, adds: bool) -> Function:
    """x += `change`, if it `adds`; result = x / sqrt(sum(x^2) + floor) * gain, for each of `rows` rows of `width`.

    With floor = width eps and gain = sqrt(width) weight that is RMSNorm (arXiv:1910.07467).
    """

    def write(code: Code) -> None:
        all_x, changes, gain, results = map(code.floats, ("x", "change", "gain", "result"))
        begin, end = code.share(code.field("rows"))
        unrolled = 4 if width % (4 * code.lanes) == 0 else 1
        with code.loop(end, begin) as row:
            x, change, result = (array + row * width for array in (all_x, changes, results))
            sums = [Variable(code.vector(0)) for _ in range(unrolled)]
            with code.loop(code.whole(width), step=unrolled * code.lanes) as start:
                for i, squares in enumerate(sums):
                    place = start + i * code.lanes
                    value = x[place]
                    if adds:
                        x[place] = value = value + change[place]
                    squares.set(squares.get() + value * value)
            total = sum((squares.get() for squares in sums[1:]), sums[0].get())
            scale = code.spread(code.one(1) / code.root(code.sum(total) + code.one(floor)))
            with code.loop(code.whole(width), step=code.lanes) as place:
                result[place] = x[place] * scale * gain[place]

    return Function("norm", lanes(width), ("x", "change", "gain", "result", "rows"), write)


@cache
def swiglu(width: int) -> Function:
    """result = gate / (1 + e^-gate) * up (arXiv:2002.05202), for each of `rows` rows: x is (2 width), gate and up."""

    def write(code: Code) -> None:
        all_x, results = map(code.floats, ("x", "result"))
        begin, end = code.share(code.field("rows"))
        one, less = code.vector(1), code.vector(-1)
        with code.loop(end, begin) as row:
            x, result = all_x + row * (2 * width), results + row * width
            up = x + code.whole(width)
            with code.loop(code.whole(width), step=code.lanes) as place:
                gate = x[place]
                result[place] = gate / (one + code.exp(gate * less)) * up[place]

    return Function("swiglu", lanes(width), ("x", "result", "rows"), write)
