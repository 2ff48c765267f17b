"""Plain LoRA added to a weight in one pass: every number is read once, changed in a register, and written once.

With PyTorch the widening, the product, the sum and the rounding go over memory one after another. LLVM compiles a
function that does them all, for the processor it runs on, in a few hundredths of a second. It is blocked as products of
matrices are (Goto and van de Geijn, doi:10.1145/1356052.1356053): a tile of the product stays in registers while the
ranks are summed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from suite import llvm

STORED = {"BF16": "i16", "F16": "half", "F32": "float"}
"""How weights lie in memory. LLVM has a bfloat16 too: processors take its smallest numbers for zero."""


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
    return WIDE if llvm.has("avx512f") else NARROW


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
    code = llvm.compiled(function(source, target, tile), "add")
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 4, ctypes.c_float)
    return Code(prototype(code.address), code.owner)


def function(source: str, target: str, tile: Tile) -> str:
    """The function in LLVM's language: three loops, each of at least one round, and a tile written out in full."""
    rows, vectors = range(tile.rows), range(tile.vectors)
    cells = [{"n": tile.lanes, "c": i * tile.vectors + j, "i": i, "j": j} for i in rows for j in vectors]
    return FUNCTION.format(
        n=tile.lanes,
        rows=tile.rows,
        width=tile.width,
        sums="".join(SUM.format(**cell) for cell in cells),
        inputs="".join(INPUT.format(n=tile.lanes, j=j, skipped=j * tile.lanes) for j in vectors),
        outputs="".join(OUTPUT.format(n=tile.lanes, i=i) for i in rows),
        products="".join(PRODUCT.format(**cell) for cell in cells),
        merged="".join(
            (PLACE + WIDEN[source] + MERGE + ROUND[target] + STORE).format(
                **cell, skipped=cell["j"] * tile.lanes, source=STORED[source], target=STORED[target]
            )
            for cell in cells
        ),
    )


FUNCTION = """
declare i64 @llvm.smin.i64(i64, i64)
declare <{n} x float> @llvm.fma.v{n}f32(<{n} x float>, <{n} x float>, <{n} x float>)

define void @add(ptr noalias %given, ptr noalias %result, ptr noalias %left, ptr noalias %panels,
                 i64 %rows, i64 %columns, i64 %rank, i64 %height, float %scale) {{
entry:
  %last.row = sub i64 %rows, {rows}
  %last.column = sub i64 %columns, {width}
  %one.scale = insertelement <{n} x float> poison, float %scale, i32 0
  %factor = shufflevector <{n} x float> %one.scale, <{n} x float> poison, <{n} x i32> zeroinitializer
  br label %down
down:
  %y = phi i64 [0, %entry], [%y.next, %down.end]
  %row = call i64 @llvm.smin.i64(i64 %y, i64 %last.row)
  %outputs = getelementptr float, ptr %left, i64 %row
  br label %across
across:
  %x = phi i64 [0, %down], [%x.next, %across.end]
  %column = call i64 @llvm.smin.i64(i64 %x, i64 %last.column)
  %before = mul i64 %x, %rank
  %panel = getelementptr float, ptr %panels, i64 %before
  br label %ranks
ranks:
  %k = phi i64 [0, %across], [%k.next, %ranks]
  {sums}
  %k.in = mul i64 %k, {width}
  %k.out = mul i64 %k, %height
  {inputs}
  {outputs}
  {products}
  %k.next = add i64 %k, 1
  %k.more = icmp slt i64 %k.next, %rank
  br i1 %k.more, label %ranks, label %across.end
across.end:
  {merged}
  %x.next = add i64 %x, {width}
  %x.more = icmp slt i64 %x.next, %columns
  br i1 %x.more, label %across, label %down.end
down.end:
  %y.next = add i64 %y, {rows}
  %y.more = icmp slt i64 %y.next, %rows
  br i1 %y.more, label %down, label %end
end:
  ret void
}}
"""
SUM = """
  %sum{c} = phi <{n} x float> [zeroinitializer, %across], [%product{c}, %ranks]"""
INPUT = """
  %input.place{j} = add i64 %k.in, {skipped}
  %input.from{j} = getelementptr float, ptr %panel, i64 %input.place{j}
  %input{j} = load <{n} x float>, ptr %input.from{j}, align 4"""
OUTPUT = """
  %output.place{i} = add i64 %k.out, {i}
  %output.from{i} = getelementptr float, ptr %outputs, i64 %output.place{i}
  %one{i} = load float, ptr %output.from{i}, align 4
  %first{i} = insertelement <{n} x float> poison, float %one{i}, i32 0
  %output{i} = shufflevector <{n} x float> %first{i}, <{n} x float> poison, <{n} x i32> zeroinitializer"""
PRODUCT = """
  %product{c} = call <{n} x float> @llvm.fma.v{n}f32(
    <{n} x float> %output{i}, <{n} x float> %input{j}, <{n} x float> %sum{c})"""
PLACE = """
  %line{c} = add i64 %row, {i}
  %start{c} = mul i64 %line{c}, %columns
  %tile{c} = add i64 %start{c}, %column
  %place{c} = add i64 %tile{c}, {skipped}
  %from{c} = getelementptr {source}, ptr %given, i64 %place{c}
  %stored{c} = load <{n} x {source}>, ptr %from{c}, align 1"""
WIDEN = {
    "F32": """
  %weight{c} = bitcast <{n} x float> %stored{c} to <{n} x float>""",
    "F16": """
  %weight{c} = fpext <{n} x half> %stored{c} to <{n} x float>""",
    "BF16": """
  %wide{c} = zext <{n} x i16> %stored{c} to <{n} x i32>
  %upper{c} = shl <{n} x i32> %wide{c}, splat (i32 16)
  %weight{c} = bitcast <{n} x i32> %upper{c} to <{n} x float>""",
}
MERGE = """
  %change{c} = fmul <{n} x float> %product{c}, %factor
  %merged{c} = fadd <{n} x float> %weight{c}, %change{c}"""
ROUND = {
    "F32": """
  %rounded{c} = bitcast <{n} x float> %merged{c} to <{n} x float>""",
    "F16": """
  %rounded{c} = fptrunc <{n} x float> %merged{c} to <{n} x half>""",
    # to the nearest number, of two as near to the even one; 0x7FC0 is not a number
    "BF16": """
  %bits{c} = bitcast <{n} x float> %merged{c} to <{n} x i32>
  %kept{c} = lshr <{n} x i32> %bits{c}, splat (i32 16)
  %odd{c} = and <{n} x i32> %kept{c}, splat (i32 1)
  %half{c} = add <{n} x i32> %odd{c}, splat (i32 32767)
  %raised{c} = add <{n} x i32> %bits{c}, %half{c}
  %number{c} = lshr <{n} x i32> %raised{c}, splat (i32 16)
  %none{c} = fcmp uno <{n} x float> %merged{c}, %merged{c}
  %chosen{c} = select <{n} x i1> %none{c}, <{n} x i32> splat (i32 32704), <{n} x i32> %number{c}
  %rounded{c} = trunc <{n} x i32> %chosen{c} to <{n} x i16>""",
}
STORE = """
  %to{c} = getelementptr {target}, ptr %result, i64 %place{c}
  store <{n} x {target}> %rounded{c}, ptr %to{c}, align 1"""
