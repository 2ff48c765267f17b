"""A `Code` made into a function that can be called: in this thread, or by all those that torch computes with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from serve.torch.native.code import THREAD, THREADS, Code
from suite import llvm

ALONE = f"""
define i32 @{THREAD}() {{
  ret i32 0
}}
define i32 @{THREADS}() {{
  ret i32 1
}}
"""
"""For a torch whose threads cannot be found."""


class Function:
    """What `write` wrote, compiled."""

    def __init__(self, name: str, lanes: int, fields: Sequence[str], write: Callable[[Code], None]) -> None:
        code = Code(name, lanes, fields)
        write(code)
        self._threads = _threads()
        text = code.text()
        self._code = llvm.compiled(text if self._threads else _without_threads(text), name)
        self._block: Any = type(name, (ctypes.Structure,), {"_fields_": [(field, ctypes.c_int64) for field in fields]})
        # it is over sooner than another thread could be given the interpreter
        self._here = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self._code.address)

    def with_(self, **fields: int) -> Call:
        """A call of it, with these fields and zeros for others."""
        return Call(self, self._block(**fields))

    def at(self, address: int, together: bool) -> Callable[[], object]:
        """What calls it with the fields at an address, in this thread or `together` with torch's others."""
        if together and self._threads is not None:
            return partial(self._threads, self._code.address, address, torch.get_num_threads(), 0)
        return partial(self._here, address)


class Call:
    """A call of a function that can be made again and again. Who makes it keeps what its addresses point to."""

    def __init__(self, function: Function, fields: Any) -> None:
        self._function = function  # who has the machine code
        self.fields = fields
        """Attributes, which may be changed."""
        here, together = (function.at(ctypes.addressof(fields), each) for each in (False, True))
        self.ways = here, together
        """What makes it: in this thread, or in all of torch's."""

    def __call__(self, together: bool) -> None:
        """Make it, in this thread or `together` with torch's others."""
        self.ways[together]()


@cache
def widest() -> int:
    """The floats in a vector of this processor."""
    return 16 if llvm.has("avx512f") else 8 if llvm.has("avx2") else 4


def lanes(*sizes: int) -> int:
    """The floats in the largest vector that all sizes are multiples of."""
    most = widest()
    while any(size % most for size in sizes):
        most //= 2
    return most


@cache
def _threads() -> Callable[..., None] | None:
    """What runs a function in all threads of the OpenMP that torch brought along."""
    root = Path(torch.__file__).parent
    for file in sorted([*(root.parent / "torch.libs").glob("lib*omp*"), *(root / "lib").glob("lib*omp*")]):
        try:
            library = ctypes.CDLL(str(file))
            run = library.GOMP_parallel
            names = [(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value) for name in (THREAD, THREADS)]
        except (OSError, AttributeError):
            continue
        run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        for name, address in names:
            llvm.know(name, address or 0)
        return run
    return None


def _without_threads(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("declare") or "omp_get" not in line]
    return "\n".join(lines) + ALONE
