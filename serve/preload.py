"""A server starts by importing its libraries: begin early what can run beside that, leave out what is not used."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
from pathlib import Path

from suite import quantized

UNUSED = ("torchao", "boto3")
"""Imported by transformers and accelerate wherever they are installed: for quantizers, and for a cloud's settings."""


def preload(model: Path) -> None:
    """Map torch's libraries in a thread, and keep what is not used from being imported unless `model` is quantized.

    Half of importing torch is the loader's work, which holds the interpreter's lock in an import and not in ctypes.
    """
    if "torch" in sys.modules:
        return
    if quantized.settings(model) is None:
        for name in UNUSED:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # Python's own way to say: not there
    found = importlib.util.find_spec("torch")
    for folder in (found and found.submodule_search_locations) or ():
        library = Path(folder) / "lib" / "libtorch_python.so"
        if library.is_file():
            threading.Thread(target=ctypes.CDLL, args=(str(library),), daemon=True).start()
