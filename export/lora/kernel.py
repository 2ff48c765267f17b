"""Plain LoRA added to a weight in one pass: every number is read once, changed in a register, and written once.

With PyTorch the widening, the product, the sum and the rounding go over memory one after another. LLVM compiles a
function that does them all, for the processor it runs on, in a few hundredths of a second. It is blocked as products of
matrices are (Goto and van de Geijn, doi:10.1145/1356052.1356053): a tile of the product stays in registers while the
ranks are summed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from llvmlite import binding, ir

HALF, FLOAT = ir.HalfType(), ir.FloatType()
SHORT, INT, LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)
STORED = {"BF16": SHORT, "F16": HALF, "F32": FLOAT}
"""How weights lie in memory. LLVM has a bfloat16 too: processors take its smallest numbers for zero."""
NOT_A_NUMBER = 0x7FC0


class Tile(NamedTuple):
    """The part of a product that is in registers: `rows` times `vectors`, each of `lanes` numbers."""

    lanes: int
    vectors: int
    rows: int = 6

    @property
    def width(self) -> int:
        """Columns."""
        return self.lanes * self.vectors


class Code(NamedTuple):
    """A compiled function, and what owns its machine code.

    `add` takes the addresses of given, result, left (rank, height) and panels (count, rank, width), then the numbers of
    rows and columns, rank, height and scale.
    """

    add: Callable[..., None]
    owner: Any


WIDE, NARROW = Tile(16, 4), Tile(8, 2)
"""For 32 registers of 512 bits; for 16 of 256 bits, or 32 of 128."""


@cache
def best() -> Tile:
    """The tile for this processor."""
    return WIDE if binding.get_host_cpu_features().get("avx512f") else NARROW


def takes(shape: tuple[int, int], source: str, target: str) -> bool:
    """Whether a weight of this shape holds a whole tile, and is of a type that is known here, before and after."""
    return shape[0] >= best().rows and shape[1] >= best().width and {source, target} <= STORED.keys()


class Fused:
    """Adds `scale * left @ right` to rows of a weight of type `source`, which become of type `target`.

    `left` is (height, rank), `right` (rank, columns). Rounds as peft does: the product, summed in the order of the
    ranks, then its multiple, then the sum, each in float32.
    """

    def __init__(
        self, left: torch.Tensor, right: torch.Tensor, scale: float, source: str, target: str, tile: Tile | None = None
    ) -> None:
        tile = tile or best()
        self.left, self.panels, self.scale = left.T.contiguous(), panels(right, tile.width), scale
        self.code = compiled(source, target, tile)

    def __call__(self, given: torch.Tensor, first: int, result: torch.Tensor) -> None:
        """Make `result` (n, columns) of `given`, rows of the weight from `first`; both contiguous, and not one memory.

        What is left at the edges is computed in whole tiles too, which overlap others.
        """
        left = self.left.data_ptr() + first * self.left.element_size()
        addresses = given.data_ptr(), result.data_ptr(), left, self.panels.data_ptr()
        self.code.add(*addresses, *given.shape, *self.left.shape, self.scale)


def panels(right: torch.Tensor, width: int) -> torch.Tensor:
    """`right` (rank, columns) in panels (count, rank, width); the last may overlap the one before."""
    whole = right.unfold(1, width, width).transpose(0, 1)
    return (torch.cat([whole, right[None, :, -width:]]) if right.shape[1] % width else whole).contiguous()


@cache
def compiled(source: str, target: str, tile: Tile) -> Code:
    """The function for weights of these types."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, jit=True
    )
    module = binding.parse_assembly(str(Emitter(source, target, tile).module))
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, ctypes.c_float)
    return Code(prototype(engine.get_function_address("add")), engine)


class Loop:
    """`for index in range(0, stop, step)`; `values` are what the round before set as `following`."""

    def __init__(self, build: ir.IRBuilder, stop: ir.Value, step: int, start: Sequence[ir.Value] = ()) -> None:
        self.build, self.step, self.following = build, step, list(start)
        before = build.block
        head, self.body, self.end = (build.append_basic_block() for _ in range(3))
        self.head = head
        build.branch(head)
        build.position_at_end(head)
        self.index = build.phi(LONG)
        self.index.add_incoming(LONG(0), before)
        self.values = [build.phi(value.type) for value in start]
        for phi, value in zip(self.values, start, strict=True):
            phi.add_incoming(value, before)
        build.cbranch(build.icmp_signed("<", self.index, stop), self.body, self.end)

    def __enter__(self) -> Loop:
        self.build.position_at_end(self.body)
        return self

    def __exit__(self, *_: object) -> None:
        build = self.build
        self.index.add_incoming(build.add(self.index, LONG(self.step)), build.block)
        for phi, value in zip(self.values, self.following, strict=True):
            phi.add_incoming(value, build.block)
        build.branch(self.head)
        build.position_at_end(self.end)


class Emitter:
    """Writes the function in LLVM's language, as `module`."""

    def __init__(self, source: str, target: str, tile: Tile) -> None:
        self.source, self.target, self.tile = source, target, tile
        self.floats, self.ints = ir.VectorType(FLOAT, tile.lanes), ir.VectorType(INT, tile.lanes)
        self.module = ir.Module()
        self.module.triple = binding.get_process_triple()
        three = ir.FunctionType(self.floats, [self.floats] * 3)
        self.fma = ir.Function(self.module, three, f"llvm.fma.v{tile.lanes}f32")
        types = [ir.PointerType()] * 4 + [LONG] * 4 + [FLOAT]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), "add")
        for pointer in function.args[:4]:
            pointer.add_attribute("noalias")
        self.build = ir.IRBuilder(function.append_basic_block())
        self._add(*function.args)

    def _add(self, *arguments: ir.Value) -> None:
        given, result, left, panels, rows, columns, rank, height, scale = arguments
        build, tile = self.build, self.tile
        last_row, last_column = build.sub(rows, LONG(tile.rows)), build.sub(columns, LONG(tile.width))
        factor = self._spread(scale)
        with Loop(build, rows, tile.rows) as down:
            row = self._smaller(down.index, last_row)
            with Loop(build, columns, tile.width) as across:
                column = self._smaller(across.index, last_column)
                panel = self._at(panels, FLOAT, build.mul(across.index, rank))
                product = self._product(self._at(left, FLOAT, row), height, panel, rank)
                for i, change in enumerate(product):
                    start = build.add(build.mul(build.add(row, LONG(i // tile.vectors)), columns), column)
                    place = build.add(start, LONG(i % tile.vectors * tile.lanes))
                    weight = self._widen(self._load(given, STORED[self.source], place))
                    weight = build.fadd(weight, build.fmul(change, factor))
                    build.store(self._round(weight), self._at(result, STORED[self.target], place), align=1)
        build.ret_void()

    def _product(self, left: ir.Value, height: ir.Value, panel: ir.Value, rank: ir.Value) -> list[ir.Value]:
        """The vectors of one tile, row by row."""
        build, tile = self.build, self.tile
        zero = ir.Constant(self.floats, None)
        with Loop(build, rank, 1, [zero] * (tile.rows * tile.vectors)) as ranks:
            start = build.mul(ranks.index, LONG(tile.width))
            inputs = [self._load(panel, FLOAT, build.add(start, LONG(i * tile.lanes))) for i in range(tile.vectors)]
            start = build.mul(ranks.index, height)
            for i in range(tile.rows):
                output = build.load(self._at(left, FLOAT, build.add(start, LONG(i))), typ=FLOAT, align=4)
                factor = self._spread(output)
                for j, vector in enumerate(inputs, i * tile.vectors):
                    ranks.following[j] = build.call(self.fma, [factor, vector, ranks.values[j]])
        return ranks.values

    def _widen(self, stored: ir.Value) -> ir.Value:
        if self.source == "BF16":
            return self.build.bitcast(self.build.shl(self.build.zext(stored, self.ints), self._all(16)), self.floats)
        return self.build.fpext(stored, self.floats) if self.source == "F16" else stored

    def _round(self, weight: ir.Value) -> ir.Value:
        """To the nearest number of the type that is stored; of two as near, to the even one."""
        build = self.build
        if self.target == "BF16":
            bits = build.bitcast(weight, self.ints)
            odd = build.and_(build.lshr(bits, self._all(16)), self._all(1))
            upper = build.lshr(build.add(bits, build.add(odd, self._all(0x7FFF))), self._all(16))
            upper = build.select(build.fcmp_unordered("uno", weight, weight), self._all(NOT_A_NUMBER), upper)
            return build.trunc(upper, ir.VectorType(SHORT, self.tile.lanes))
        return build.fptrunc(weight, ir.VectorType(HALF, self.tile.lanes)) if self.target == "F16" else weight

    def _all(self, number: int) -> ir.Constant:
        return ir.Constant(self.ints, [number] * self.tile.lanes)

    def _spread(self, number: ir.Value) -> ir.Value:
        """A vector of one number."""
        nothing = ir.Constant(self.floats, ir.Undefined)
        one = self.build.insert_element(nothing, number, INT(0))
        return self.build.shuffle_vector(one, nothing, ir.Constant(self.ints, None))

    def _smaller(self, one: ir.Value, other: ir.Value) -> ir.Value:
        return self.build.select(self.build.icmp_signed("<", one, other), one, other)

    def _at(self, memory: ir.Value, kind: ir.Type, index: ir.Value) -> ir.Value:
        return self.build.gep(memory, [index], source_etype=kind)

    def _load(self, memory: ir.Value, kind: ir.Type, index: ir.Value) -> ir.Value:
        return self.build.load(self._at(memory, kind, index), typ=ir.VectorType(kind, self.tile.lanes), align=1)
