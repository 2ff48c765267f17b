"""llama.cpp at work, in a process that `export.llamacpp` starts: python -m export.llamacpp_process PARENT

Requests come as lines of JSON on stdin, each is answered by one line on stdout, logits by their bytes after it.
Whatever native code prints goes to stderr, and a crash of it ends this process only.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from suite.processes import die_with

STEP = re.compile(rb"\[ *(\d+)/ *(\d+)\]")


class Session:
    """The models that were asked for, loaded when first used, and how to answer each request."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._loaded: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> None:
        """Do what `request` asks for and write the answer; an exception becomes an answer too."""
        do: dict[str, Callable[..., None]] = {
            "tokenize": self._tokenize,
            "logits": self._logits,
            "quantize": self._quantize,
        }
        name = request.pop("do")
        try:
            do[name](**request)
        except (RuntimeError, ValueError, MemoryError) as error:
            self._say({"error": str(error)})

    def _tokenize(self, file: str, text: str, special: bool) -> None:
        if "vocabulary" not in self._loaded:
            from llama_cpp import Llama

            self._loaded["vocabulary"] = Llama(file, vocab_only=True)
        ids = self._loaded["vocabulary"].tokenize(text.encode(), add_bos=True, special=special)
        self._say({"ids": ids})

    def _logits(self, file: str, adapter: str | None, context: int, ids: list[int]) -> None:
        if "model" not in self._loaded:
            from llama_cpp import Llama

            # caches and sums in float32: what is measured is the file, not the settings of a server
            self._loaded["model"] = Llama(
                file, lora_path=adapter, n_ctx=context, logits_all=True, type_k=0, type_v=0, flash_attn=False,
                n_threads=_cores(), n_threads_batch=_cores(),
            )  # fmt: skip
        model = self._loaded["model"]
        model.reset()
        model.eval(ids)
        found = np.ascontiguousarray(model.scores[: len(ids)], dtype=np.float32)
        self._say({"shape": found.shape})
        self._out.write(found.data)
        self._out.flush()

    def _quantize(self, source: str, out: str, file_type: int) -> None:
        import llama_cpp

        def heard(_level: int, text: bytes, _data: Any) -> None:
            os.write(2, text)
            if step := STEP.search(text):
                self._say({"step": int(step[1]), "steps": int(step[2])})

        callback = llama_cpp.llama_log_callback(heard)  # lives as long as this call
        llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = file_type, _cores()
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(settings))
        self._say({"error": "llama_model_quantize failed"} if code else {"done": True})

    def _say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def main() -> None:
    """Answer until stdin ends, or process PARENT does."""
    die_with(int(sys.argv[1]))
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # what native code prints is no answer
        session = Session(out)
        for line in sys.stdin.buffer:
            session.answer(json.loads(line))


if __name__ == "__main__":
    main()
