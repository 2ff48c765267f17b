"""A server starts by importing its libraries, which takes longer than all else: begin early what can run beside that,
and leave out what they import for features that no server here uses.

Nothing depends on it: what is asked of something left out is imported then, or is reported absent as where it is not
installed. A quantized model may need any of it, and gets all. tests/tiny/test_start.py sees what is left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from serve.structures import kept
from suite import quantized

F = TypeVar("F")

UNUSED = ("torchao", "boto3", "PIL", "orjson", "httpx._main")
"""Imported wherever they are installed: for quantizers, a cloud's settings, images, another JSON, a command line."""


def preload(model: Path) -> None:
    """Map torch's libraries in a thread: half of importing torch is the loader's work, which needs no Python."""
    if "torch" in sys.modules:
        return
    # threads that spin for as long as they wait take the cores from those that work; those that sleep at once wake too
    # late for the next operation of a step: a tenth of a millisecond lies between
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if quantized.settings(model) is None:
        _without(*UNUSED)
    found = importlib.util.find_spec("torch")
    for folder in (found and found.submodule_search_locations) or ():
        library = Path(folder) / "lib" / "libtorch_python.so"
        if library.is_file():
            # called by itself: ctypes.CDLL(...) would keep the interpreter's lock while it loads
            load = ctypes.CDLL(None).dlopen
            load.restype, load.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
            threading.Thread(target=load, args=(os.fsencode(library), os.RTLD_NOW), daemon=True).start()


def libraries(model: Path) -> None:
    """Import torch, and what all of transformers needs."""
    import torch

    if "transformers" in sys.modules or quantized.settings(model) is not None:
        return
    if not torch.cuda.is_available():  # it spreads models over GPUs
        _without("accelerate")
    sys.modules.setdefault("torch._dynamo", Uncompiled())
    # its utilities can be imported before it, if there is something of its name
    found = importlib.util.find_spec("transformers")
    package = ModuleType("transformers")
    package.__path__ = list((found and found.submodule_search_locations) or ())
    package.__version__ = version = importlib.metadata.version("transformers")  # type: ignore[attr-defined]
    sys.modules["transformers"] = package
    try:
        with _replaced(importlib.metadata, "packages_distributions", Distributions):
            utils: Any = importlib.import_module("transformers.utils.import_utils")
    finally:
        del sys.modules["transformers"]
    with _replaced(torch.distributed, "is_available", lambda: False):
        utils.is_torch_distributed_available()  # which keeps its answer
    utils.create_import_structure_from_path = kept(utils.create_import_structure_from_path, version)
    importlib.import_module("transformers")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without(*modules: str) -> None:
    for name in modules:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to say: not there


class Distributions(dict[str, list[str]]):
    """`importlib.metadata.packages_distributions()`, which reads the files of all that is installed, when needed."""

    _read = staticmethod(importlib.metadata.packages_distributions)

    @cached_property
    def _every(self) -> Mapping[str, list[str]]:
        return self._read()

    def get(self, package: str, default: Any = None) -> Any:
        """The distributions that have `package`; most have its name."""
        try:
            return [importlib.metadata.distribution(package.replace("_", "-")).name]
        except importlib.metadata.PackageNotFoundError:
            return self._every.get(package, default)


class Uncompiled(ModuleType):
    """`torch._dynamo`, torch's compiler, while nothing is compiled: its marks do nothing, all else imports it."""

    def __init__(self) -> None:
        super().__init__("torch._dynamo")
        folder = Path(sys.modules["torch"].__path__[0]) / "_dynamo"
        spec = importlib.util.spec_from_file_location(
            self.__name__, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec
        assert spec.loader
        self.__spec__, self.__loader__, self.__file__ = spec, spec.loader, spec.origin
        self.__path__, self.__package__ = [str(folder)], self.__name__

    @staticmethod
    def disable(fn: F | None = None, *_: Any, **__: Any) -> Any:
        """Marks what must not be compiled."""
        return fn or (lambda function: function)

    @staticmethod
    def allow_in_graph(fn: F) -> F:
        """Marks what is compiled as it is."""
        return fn

    assume_constant_result = allow_in_graph

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__
        assert self.__spec__.loader
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
