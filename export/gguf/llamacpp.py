"""llama.cpp, where it is installed: it quantizes GGUF files, and answers with them, which proves what they will do.

It works in a process of its own (`export.gguf.llamacpp_process`): its chatter stays out of the terminal, and a crash of
native code is an error with its last words.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from export import gguf
from export.gguf.model import Model
from export.gguf.texts import texts
from export.gguf.tokenizer import adds_space_once
from export.limits import Limits
from suite.errors import SuiteError

Progress = Callable[[float, float, str], None]
Say = Callable[[str], None]
Quant = Literal["q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"]

Weights = Literal[gguf.Weights, Quant]

QUANTS: tuple[str, ...] = get_args(Quant)
HINT = 'pip install "suite[llamacpp]"'
NOT_RUN = f"not run by llama.cpp, which is not installed; to prove tokens and answers: {HINT}"
CONTEXT = 512
"""Tokens of the longest text that is asked."""
CURE = "give it wider weights, such as q8_0 or f16"
SAME = ("f32", "f16")
"""Types whose greedy answers must be the model's, but for tokens that are as good."""
LIMITS = {
    name: Limits(kl=kl, top1=top1, greedy=float(name in SAME), cure=CURE)
    for names, kl, top1 in (
        (("f32",), 1e-5, 0.999),
        (("f16",), 1e-4, 0.999),
        (("bf16",), 1e-3, 0.98),
        (("q8_0",), 5e-3, 0.9),
        (("q6_k",), 0.02, 0.8),
        (("q5_k_m", "q5_k_s", "q5_0"), 0.05, 0.7),
        (("q4_k_m", "q4_k_s", "q4_0"), 0.15, 0.5),
        (("q3_k_l", "q3_k_m", "q3_k_s"), 0.4, 0.3),
        (("q2_k",), 1.5, 0.1),
    )
    for name in names
}
"""What a file of each type must keep of its model: declared, several times what trained models were seen to lose."""


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def check(folder: Path, weights: Weights) -> None:
    """Raise SuiteError for a model that has no GGUF of this type, or none without llama.cpp; torch-free."""
    gguf.check(folder)
    if weights in QUANTS and not installed():
        raise SuiteError(f"a GGUF of type {weights} needs llama.cpp, which is not installed", hint=HINT)


class LlamaCpp:
    """A GGUF file as llama.cpp computes with it, with a LoRA adapter's GGUF on top if given.

    The process starts with the first question; `close` it, or use `with`.
    """

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        self._file, self._adapter = file, adapter
        self._process: _Process | None = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.close()
            self._process = None

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text` as of a prompt; `special`: special tokens in it are meant, not just spelt."""
        return list(self._ask(do="tokenize", file=str(self._file), text=text, special=special)["ids"])

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Of the next token at each position, (T, V) float32; the cache is float32 too."""
        if len(ids) > CONTEXT:
            raise ValueError(f"{len(ids)} tokens; at most {CONTEXT} can be asked")
        adapter = str(self._adapter) if self._adapter else None
        answer = self._ask(do="logits", file=str(self._file), adapter=adapter, context=CONTEXT, ids=list(ids))
        assert self._process
        return self._process.read_array(answer["shape"])

    def _ask(self, **request: Any) -> dict[str, Any]:
        self._process = self._process or _Process(str(self._file))
        return self._process.ask(request)


def write(
    folder: Path,
    out: Path,
    weights: Weights,
    name: str,
    scratch: Path,
    progress: Progress = lambda *_: None,
    warn: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the model in `folder` to the GGUF file `out` as any type, and prove it: read back, and run by llama.cpp.

    Types that llama.cpp makes are made from one that holds the weights as they are, which lies in `scratch` meanwhile.
    Returns what was found; raises SuiteError as `export.gguf.write`, `quantize` and `verify` do.
    """
    check(folder, weights)
    if Model.read(folder).sees:
        warn("the GGUF holds the language model alone: it cannot be shown images")
    found: dict[str, Any] = {}
    if weights in QUANTS:
        source = scratch / "lossless.gguf"
        gguf.write(folder, source, gguf.lossless(folder), name, progress)
        found["weights"] = gguf.verify(folder, source)
        found |= quantize(source, out, cast(Quant, weights), progress)
        source.unlink()
        if fell_back := found["fell_back"]:
            types, block = ", ".join(sorted(set(fell_back.values()))), _block(weights)
            warn(f"{len(fell_back)} tensors became {types}: {weights} is for rows that are a multiple of {block}")
    else:
        gguf.write(folder, out, cast(gguf.Weights, weights), name, progress)
        found["weights"] = gguf.verify(folder, out)
    return {"bytes": out.stat().st_size, **found, "llamacpp": verify(folder, out, weights, progress, warn)}


def quantize(source: Path, out: Path, quant: Quant, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Write the GGUF file `source` (f32, f16 or bf16) to `out` as `quant`.

    Returns how many tensors have which type, and which fell back to another one than `quant` asks for, because their
    rows are no multiple of its block. Raises SuiteError when llama.cpp cannot.
    """
    import gguf as reading

    number = int(reading.LlamaFileType[f"MOSTLY_{quant.upper()}"])
    process = _Process(str(source))
    try:
        request = {"do": "quantize", "source": str(source), "out": str(out), "file_type": number}
        process.ask(request, lambda step, steps: progress(step, steps, "quantize"))
    finally:
        process.close()
    types: dict[str, int] = {}
    fell_back = {}
    for tensor in reading.GGUFReader(out).tensors:
        name = tensor.tensor_type.name
        types[name] = types.get(name, 0) + 1
        if name != "F32" and int(tensor.shape[0]) % _block(quant):
            fell_back[str(tensor.name)] = name
    return {"types": dict(sorted(types.items())), "fell_back": fell_back}


def _block(quant: str) -> int:
    """Values of one block; a row that is no multiple of it falls back to another type."""
    return 256 if "_k" in quant else 32


def verify(
    folder: Path,
    file: Path,
    weights: Weights,
    progress: Progress = lambda *_: None,
    warn: Say = lambda _: None,
    adapters: tuple[Path, Path] | None = None,
) -> dict[str, Any]:
    """Prove the GGUF `file` of type `weights` by llama.cpp against the model in `folder`.

    `adapters` are a PEFT adapter of that model and the same as GGUF, put on top of both. Returns how many texts were
    tokenized and the measured parity; {} with a warning where llama.cpp is not installed. Raises SuiteError for a text
    that becomes other tokens, and for answers beyond the limits of the type.
    """
    if not installed():
        warn(NOT_RUN)
        return {}
    from export import parity

    source, adapter = adapters or (None, None)
    with LlamaCpp(file, adapter) as model:
        proved: dict[str, Any] = {"texts": same_tokens(folder, model, warn)}
        proved["parity"] = parity.measure(
            lambda: parity.load(folder, source), lambda: model, parity.probes(folder), progress
        )
    parity.require(proved["parity"], _limits(folder, weights), str(file))
    return proved


def _limits(folder: Path, weights: Weights) -> Limits:
    """Those of the type; wider for experts, where rounding may choose another that is almost as good: a step."""
    limits = LIMITS[weights]
    if weights == "f32" or not Model.read(folder).experts:
        return limits
    return replace(limits, kl=10 * limits.kl, top1=limits.top1 - 0.02, greedy=0.0)


def same_tokens(folder: Path, model: LlamaCpp, warn: Say = lambda _: None) -> int:
    """Compare the tokens of tricky texts with those of the tokenizer in `folder`; returns how many texts.

    Where llama.cpp is known not to do all that the tokenizer does, texts are such that both should agree, with a
    warning. Raises SuiteError naming the first text that differs, and both ids.
    """
    from suite.chat import load_tokenizer

    tokenizer = load_tokenizer(folder)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    asked = texts(special[:32])
    known = _known_difference(tokenizer)
    agreed = [known.change(text) for text in asked]
    if agreed != asked:
        warn(f"llama.cpp {known.lacks}")
    for as_special in (True, False) if known.spelt else (True,):
        for text in agreed:
            expected = tokenizer(text, split_special_tokens=not as_special)["input_ids"]
            got = model.tokenize(text, special=as_special)
            if got != expected:
                raise SuiteError(
                    f"llama.cpp tokenizes {text!r} as {got}, the model's tokenizer as {expected}",
                    where=str(folder / "tokenizer.json"),
                    hint="the model would read other text than it was trained on; export to hf instead",
                )
    return len(asked)


@dataclass(frozen=True)
class _Known:
    """What llama.cpp `lacks`, and the `change` that makes a text one that it reads as the tokenizer does.

    `spelt`: also where special tokens in the text are only spelt.
    """

    change: Callable[[str], str] = str
    lacks: str = ""
    spelt: bool = True


def _known_difference(tokenizer: Any) -> _Known:
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    if not state["model"].get("byte_fallback"):
        if backend.normalizer is None:
            return _Known()
        kind = state["normalizer"]["type"]
        lacks = f"does not normalize text, as this tokenizer does ({kind}): combining marks become other tokens"
        return _Known(backend.normalizer.normalize_str, lacks)
    if adds_space_once(state) and tokenizer.bos_token:
        lacks = f"adds no space before a text that does not begin with {tokenizer.bos_token}, as chats do"
        return _Known(lambda text: f"{tokenizer.bos_token}{text}", lacks, spelt=False)
    return _Known()


class _Process:
    """A running `export.gguf.llamacpp_process`."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        # threads that spin while they wait take the cores from each other
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        root = Path(__file__).parents[2]
        if (root / "pyproject.toml").is_file():  # a checkout that is not installed
            environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "export.gguf.llamacpp_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment,
        )
        questions, answers = self._child.stdin, self._child.stdout
        assert questions is not None
        assert answers is not None
        self._questions, self._answers = questions, answers

    def ask(self, request: Mapping[str, Any], step: Callable[[int, int], None] = lambda *_: None) -> dict[str, Any]:
        """The answer to `request`; raises SuiteError for one that failed, or when the process ended."""
        with contextlib.suppress(BrokenPipeError):
            self._questions.write(json.dumps(request).encode() + b"\n")
            self._questions.flush()
        while line := self._answers.readline():
            answer: dict[str, Any] = json.loads(line)
            if "error" in answer:
                raise self._failed(answer["error"])
            if "step" not in answer:
                return answer
            step(answer["step"], answer["steps"])
        code = self._child.wait()
        raise self._failed(f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}")

    def read_array(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """The bytes that follow an answer."""
        size = 4 * math.prod(shape)
        data = bytearray(self._answers.read(size))
        if len(data) != size:
            raise self._failed("ended in the middle of an answer")
        return np.frombuffer(data, np.float32).reshape(shape)

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        self._answers.close()
        self._child.wait()
        self._said.close()

    def _failed(self, how: str) -> SuiteError:
        """With llama.cpp's last words that name an error, else its very last."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        for mark in ("error", "fail", ""):
            if telling := [line for line in lines if mark in line.lower()]:
                how += f": {telling[-1][:500]}"
                break
        return SuiteError(f"llama.cpp: {how}", where=self._subject)
