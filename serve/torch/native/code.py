"""A small language for loops over arrays of numbers, from which LLVM makes a function (`serve.torch.native.function`).

A `Code` has fields, whole numbers that it is called with: sizes, and addresses of arrays. Threads that run it together
take a `share` each. What it computes are `Number`s: whole ones of 64 bits, floats of 32 bits, and vectors of `lanes`
floats; operators on them write what computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

WHOLE, FLOAT, POINTER, LANE = ir.IntType(64), ir.FloatType(), ir.PointerType(), ir.IntType(32)
LOOSE = ("reassoc", "contract", "nsz")
"""Sums may be taken in any order, and products added without being rounded before."""
THREAD, THREADS = "omp_get_thread_num", "omp_get_num_threads"
"""What the code asks for its thread's number, and for how many run it together."""
LEAST = -1e30
"""Less than any score: e to the power of it is 0 beside others."""


class Number:
    """A value within a `Code`."""

    def __init__(self, code: Code, value: ir.Value) -> None:
        self.code, self.value = code, value

    def __add__(self, other: Number | int) -> Number:
        return self._with(other, "add", "fadd")

    def __sub__(self, other: Number | int) -> Number:
        return self._with(other, "sub", "fsub")

    def __mul__(self, other: Number | int) -> Number:
        return self._with(other, "mul", "fmul")

    def __truediv__(self, other: Number) -> Number:
        return self._with(other, "", "fdiv")

    def __floordiv__(self, other: Number | int) -> Number:
        return self._with(other, "sdiv", "")

    def __mod__(self, other: Number | int) -> Number:
        return self._with(other, "srem", "")

    def _with(self, other: Number | int, whole: str, floats: str) -> Number:
        other = self.code.whole(other) if isinstance(other, int) else other
        if self.value.type == WHOLE:
            return Number(self.code, getattr(self.code.build, whole)(self.value, other.value))
        return Number(self.code, getattr(self.code.build, floats)(self.value, other.value, flags=LOOSE))


class Array:
    """Numbers in memory, from an address on: floats, which are read and written as vectors, or whole ones."""

    def __init__(self, address: Number, kind: ir.Type) -> None:
        self.address, self._kind = address, kind
        self._element = kind.element if isinstance(kind, ir.VectorType) else kind

    def __add__(self, count: Number) -> Array:
        """The numbers behind the first `count`."""
        return Array(self.address + count * (8 if self._element == WHOLE else 4), self._kind)

    def __getitem__(self, place: Number | int) -> Number:
        code = self.address.code
        return Number(code, code.build.load(self._pointer(place), typ=self._kind, align=4))

    def __setitem__(self, place: Number | int, value: Number) -> None:
        self.address.code.build.store(value.value, self._pointer(place), align=4)

    def single(self, place: Number) -> Number:
        """A float by itself."""
        code = self.address.code
        return Number(code, code.build.load(self._pointer(place), typ=FLOAT, align=4))

    def _pointer(self, place: Number | int) -> ir.Value:
        code = self.address.code
        place = code.whole(place) if isinstance(place, int) else place
        start = code.build.inttoptr(self.address.value, POINTER)
        return code.build.gep(start, [place.value], source_etype=self._element)


class Variable:
    """A number that changes, as in a loop."""

    def __init__(self, first: Number) -> None:
        self._code, self._type = first.code, first.value.type
        with self._code.build.goto_entry_block():
            self._place = self._code.build.alloca(self._type)
        self.set(first)

    def get(self) -> Number:
        """What it is now."""
        return Number(self._code, self._code.build.load(self._place, typ=self._type))

    def set(self, value: Number) -> None:
        """Change it."""
        self._code.build.store(value.value, self._place)


class Code:
    """The function `name`, which is written by what its methods are asked for, in that order."""

    def __init__(self, name: str, lanes: int, fields: Sequence[str]) -> None:
        self.name, self.lanes, self._fields = name, lanes, fields
        self._vector, self._wholes = ir.VectorType(FLOAT, lanes), ir.VectorType(LANE, lanes)
        self._module = ir.Module(name)
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        self.build = ir.IRBuilder(function.append_basic_block())
        self._given = Array(Number(self, self.build.ptrtoint(function.args[0], WHOLE)), WHOLE)
        body = function.append_basic_block()  # variables are made in the first, whenever they are asked for
        self.build.branch(body)
        self.build.position_at_end(body)

    def text(self) -> str:
        """All of it in LLVM's language; nothing can be added any more."""
        self.build.ret_void()
        return str(self._module)

    # numbers and arrays

    def field(self, name: str) -> Number:
        """A whole number that the function is called with."""
        return self._given[self._fields.index(name)]

    def floats(self, name: str) -> Array:
        """The array of floats whose address is a field."""
        return self.floats_at(self.field(name))

    def floats_at(self, address: Number) -> Array:
        """The array of floats at an address."""
        return Array(address, self._vector)

    def wholes(self, name: str) -> Array:
        """The array of whole numbers whose address is a field."""
        return Array(self.field(name), WHOLE)

    def whole(self, value: int) -> Number:
        """A constant."""
        return Number(self, ir.Constant(WHOLE, value))

    def one(self, value: float) -> Number:
        """A constant."""
        return Number(self, ir.Constant(FLOAT, value))

    def vector(self, value: float) -> Number:
        """A constant in all lanes."""
        return Number(self, ir.Constant(self._vector, [value] * self.lanes))

    def room(self) -> Array:
        """An array of as many floats as a vector has, for what comes one by one and is read together, or reversed."""
        with self.build.goto_entry_block():
            place = self.build.ptrtoint(self.build.alloca(self._vector), WHOLE)
        return Array(Number(self, place), self._vector)

    # vectors

    def spread(self, value: Number) -> Number:
        """A float in all lanes."""
        return Number(self, self._spread(value.value, self._vector))

    def up_to(self, count: Number, vector: Number, rest: float) -> Number:
        """The first `count` lanes of a vector, and `rest` behind them."""
        kind = ir.VectorType(WHOLE, self.lanes)
        lanes, counts = ir.Constant(kind, [*range(self.lanes)]), self._spread(count.value, kind)
        behind = self.build.icmp_signed(">=", lanes, counts)
        return Number(self, self.build.select(behind, self.vector(rest).value, vector.value))

    def sum(self, vector: Number) -> Number:
        """Of all lanes."""
        return self._of_floats("vector.reduce.fadd", self.one(0), vector, result=FLOAT, fastmath=LOOSE)

    def highest(self, vector: Number) -> Number:
        """Of all lanes."""
        return self._of_floats("vector.reduce.fmax", vector, result=FLOAT)

    def larger(self, one: Number, other: Number) -> Number:
        """The larger of two floats, or in each lane of two vectors."""
        return self._of_floats("maxnum", one, other)

    def root(self, value: Number) -> Number:
        """The square root of a float."""
        return self._of_floats("sqrt", value)

    def exp(self, x: Number) -> Number:
        """e^x in each lane, to 2 units of the last place; an x beyond -87 and 88 counts as these.

        It is 2^n e^r, n being the whole number nearest to x / ln 2, and a polynomial for e^r (Cephes, expf.c).
        """
        x = self._of_floats("minnum", self.larger(x, self.vector(-87)), self.vector(88))
        n = self._of_floats("rint", x * self.vector(1.44269504088896341))
        # in two parts, which must not be taken together: the product with the first is not rounded
        r = self._of_floats("fma", n, self.vector(-0.693359375), x)
        r = self._of_floats("fma", n, self.vector(2.12194440e-4), r)
        power = self.vector(1.9875691500e-4)
        for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            power = power * r + self.vector(factor)
        power = power * r * r + r + self.vector(1)
        # 2^n is the float whose exponent is n, and all of whose other bits are 0
        exponent = self.build.add(self.build.fptosi(n.value, self._wholes), self._spread_constant(127))
        bits = self.build.shl(exponent, self._spread_constant(23))
        return power * Number(self, self.build.bitcast(bits, self._vector))

    # order

    @contextmanager
    def loop(self, stop: Number, start: Number | int = 0, step: int = 1) -> Iterator[Number]:
        """What is written within is done for each number from `start` on that is less than `stop`."""
        start = self.whole(start) if isinstance(start, int) else start
        before = self.build.block
        head, body, after = (self.build.append_basic_block() for _ in range(3))
        self.build.branch(head)
        self.build.position_at_end(head)
        index = self.build.phi(WHOLE)
        index.add_incoming(start.value, before)
        self.build.cbranch(self.build.icmp_signed("<", index, stop.value), body, after)
        self.build.position_at_end(body)
        yield Number(self, index)
        index.add_incoming(self.build.add(index, ir.Constant(WHOLE, step)), self.build.block)
        self.build.branch(head)
        self.build.position_at_end(after)

    @contextmanager
    def where(self, value: Number) -> Iterator[None]:
        """What is written within is done where a whole number is not 0."""
        with self.build.if_then(self.build.icmp_signed("!=", value.value, ir.Constant(WHOLE, 0))):
            yield

    def smaller(self, one: Number, other: Number) -> Number:
        """The smaller of two whole numbers."""
        return self._called("llvm.smin.i64", WHOLE, [one, other])

    def greater(self, one: Number, other: Number) -> Number:
        """The greater of two whole numbers."""
        return self._called("llvm.smax.i64", WHOLE, [one, other])

    def share(self, count: Number) -> tuple[Number, Number]:
        """Where this thread's part of `count` pieces of work begins, and where it ends."""
        asked = [self._called(name, LANE, []).value for name in (THREAD, THREADS)]
        number, threads = (Number(self, self.build.sext(value, WHOLE)) for value in asked)
        return count * number // threads, count * (number + 1) // threads

    def _spread(self, value: ir.Value, kind: ir.VectorType) -> ir.Value:
        none = ir.Constant(kind, ir.Undefined)
        first = self.build.insert_element(none, value, ir.Constant(LANE, 0))
        return self.build.shuffle_vector(first, none, self._spread_constant(0))

    def _spread_constant(self, value: int) -> ir.Value:
        return ir.Constant(self._wholes, [value] * self.lanes)

    def _of_floats(self, name: str, *values: Number, result: Any = None, **options: Any) -> Number:
        """A function that LLVM has for floats and for vectors, named by the last of the values."""
        kind = values[-1].value.type
        suffix = "f32" if kind == FLOAT else f"v{self.lanes}f32"
        return self._called(f"llvm.{name}.{suffix}", result or kind, values, **options)

    def _called(self, name: str, result: Any, values: Sequence[Number], **options: Any) -> Number:
        arguments = [number.value for number in values]
        function = self._module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(result, [value.type for value in arguments])
            function = ir.Function(self._module, kind, name)
        return Number(self, self.build.call(function, arguments, **options))
