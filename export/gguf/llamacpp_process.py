"""llama.cpp at work, in a process that `export.gguf.llamacpp` starts: python -m export.gguf.llamacpp_process PARENT

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
from functools import cache
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from suite.processes import die_with

STEP = re.compile(rb"\[ *(\d+)/ *(\d+)\]")


class Model:
    """A GGUF file in llama.cpp, or with `context` 0 its vocabulary alone; lives as long as the process."""

    def __init__(self, file: str, adapter: str | None, context: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        settings = self._api.llama_model_default_params()
        settings.vocab_only = not context
        settings.check_tensors = True
        # as the file has them: not copied into the layout of some instructions, which not every machine that names
        # them can run (AMX in a virtual machine)
        settings.use_extra_bufts = False
        self._model = self._api.llama_model_load_from_file(os.fsencode(file), settings)
        if not self._model:
            raise RuntimeError("the file cannot be loaded")
        self._vocabulary = self._api.llama_model_get_vocab(self._model)
        if context:
            self._start(adapter, context)

    def _start(self, adapter: str | None, context: int) -> None:
        api = self._api
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = _cores()
        # a cache in float32, and the plain attention: what is measured is the file, not the settings of a server
        settings.type_k = settings.type_v = api.GGML_TYPE_F32
        settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("no context can be made for the file")
        if adapter:
            lora = api.llama_adapter_lora_init(self._model, os.fsencode(adapter))
            if not lora:
                raise RuntimeError("the adapter cannot be loaded")
            one = (api.llama_adapter_lora_p_ctypes * 1)(lora)
            if api.llama_set_adapters_lora(self._context, one, 1, (ctypes.c_float * 1)(1.0)):
                raise RuntimeError("the adapter cannot be put onto the model")
        self._batch = api.llama_batch_init(context, 0, 1)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """The ids of `text`, with what the vocabulary adds at the start."""
        data = text.encode()
        room = 2 * len(data) + 16
        ids = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocabulary, data, len(data), ids, room, True, special)
        if count < 0:
            raise RuntimeError(f"{-count} tokens, more than bytes")
        return list(ids[:count])

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Of the next token at each position, (T, V)."""
        api, batch = self._api, self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
            batch.seq_id[i][0] = 0
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        if code := api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        shape = (len(ids), api.llama_vocab_n_tokens(self._vocabulary))
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), shape)


class Session:
    """Answers requests; models are loaded when first asked for."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._model = cache(Model)

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
        except (RuntimeError, MemoryError) as error:
            self._say({"error": str(error)})

    def _tokenize(self, file: str, text: str, special: bool) -> None:
        self._say({"ids": self._model(file, None, 0).tokenize(text, special)})

    def _logits(self, file: str, adapter: str | None, context: int, ids: list[int]) -> None:
        found = self._model(file, adapter, context).logits(ids)
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
