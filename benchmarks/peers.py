"""Servers to measure side by side: ours and other people's, each started by its own command in its own environment.

A server that is not being measured is stopped with SIGSTOP, so that none works while another is measured. All of a
server's processes are gone after its block.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from suite.processes import die_with, foreign

ROOT = Path(__file__).parents[1]
START_SECONDS = 300.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}


class PeerError(Exception):
    """A server did not start, or did not answer; the message says what it printed last."""


@dataclass(frozen=True)
class Setting:
    """What a server is to serve: a model folder of a model type, with adapters by name."""

    model: Path
    kind: str
    adapters: Mapping[str, Path]
    scratch: Path
    """A folder for what the server needs beside it."""


@dataclass(frozen=True)
class Command:
    """How to start a server on `{port}`, and what requests call its base model."""

    words: list[str]
    base: str = "base"
    environment: Mapping[str, str] = field(default_factory=dict)


def suite(_: Path, setting: Setting) -> Command:
    """Ours."""
    loras = ["--lora", ",".join(f"{name}={path}" for name, path in setting.adapters.items())]
    words = [sys.executable, "-m", "suite.cli", "serve", "--model", str(setting.model), "--name", "base"]
    words += ["--port", "{port}", *(loras if setting.adapters else [])]
    return Command(words, environment={"PYTHONPATH": str(ROOT)})


def swift(python: Path, setting: Setting) -> Command:
    """ms-swift; a batch that holds a request for an adapter fails as a whole, so with adapters there are none."""
    size = "1" if setting.adapters else "16"
    words = [
        str(python.with_name("swift")), "deploy", "--model", str(setting.model), "--model_type", setting.kind,
        "--template", "chatml", "--infer_backend", "transformers", "--torch_dtype", "float32",
        "--served_model_name", "base", "--host", "127.0.0.1", "--port", "{port}", "--max_batch_size", size,
        "--verbose", "false",
    ]  # fmt: skip
    if setting.adapters:
        words += ["--adapters", *(f"{name}={path}" for name, path in setting.adapters.items())]
    return Command(words)


def llamafactory(python: Path, setting: Setting) -> Command:
    """LLaMA-Factory; it serves one model and ignores the name in a request."""
    settings = {
        "model_name_or_path": str(setting.model), "template": "chatml", "infer_backend": "huggingface",
        "infer_dtype": "float32",
    }  # fmt: skip
    file = setting.scratch / "api.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()), "utf-8")
    stubs = setting.scratch / "stubs"  # it imports torchaudio for text too
    stubs.mkdir(exist_ok=True)
    (stubs / "torchaudio.py").touch()
    environment = {"API_HOST": "127.0.0.1", "API_PORT": "{port}", "PYTHONPATH": str(stubs)}
    return Command([str(python.with_name("llamafactory-cli")), "api", str(file)], environment=environment)


def vllm(python: Path, setting: Setting) -> Command:
    """vLLM on the CPU, as many adapters in a batch as there are."""
    words = [
        str(python.with_name("vllm")), "serve", str(setting.model), "--served-model-name", "base",
        "--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--max-model-len", "1024",
    ]  # fmt: skip
    if setting.adapters:
        words += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", str(len(setting.adapters)), "--lora-modules"]
        words += [f"{name}={path}" for name, path in setting.adapters.items()]
    return Command(words, environment={"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"})


def transformers(python: Path, setting: Setting) -> Command:
    """`transformers serve` with continuous batching and no adapters; its cache would take all of the memory."""
    words = [
        str(python.with_name("transformers")), "serve", str(setting.model), "--continuous-batching",
        "--attn-implementation", "sdpa", "--device", "cpu", "--dtype", "float32", "--cb-max-memory-percent", "0.1",
        "--host", "127.0.0.1", "--port", "{port}",
    ]  # fmt: skip
    return Command(words, base=str(setting.model))


PEERS: dict[str, Callable[[Path, Setting], Command]] = {
    "swift": swift, "llamafactory": llamafactory, "vllm": vllm, "transformers": transformers,
}  # fmt: skip
MIXES = ("vllm",)
"""Those that serve a base and adapters in one batch."""


@dataclass
class Server:
    """A running server. `ready` is how many seconds passed from its start to its first answer."""

    name: str
    url: str
    base: str
    process: subprocess.Popen[bytes]
    ready: float

    def freeze(self) -> None:
        """Stop all its processes until `thaw`."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def memory(self) -> float:
        """MiB of all its processes, shared pages counted once."""
        group = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        found = 0
        for process in group:
            with contextlib.suppress(psutil.Error):
                found += process.memory_full_info().pss
        return found / 2**20


@contextlib.contextmanager
def running(name: str, command: Command, scratch: Path) -> Iterator[Server]:
    """Start a server, wait for its first answer, and take it down after the block; raises PeerError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.replace("{port}", str(port)) for word in command.words]
    given = {key: value.replace("{port}", str(port)) for key, value in command.environment.items()}
    own = {key: value for key, value in foreign().items() if key != "OMP_WAIT_POLICY"}  # each server sets its own
    log = scratch / f"{name.replace(' ', '-')}.log"
    began, parent = time.perf_counter(), os.getpid()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**own, **OFFLINE, **given}, cwd=scratch, preexec_fn=lambda: die_with(parent),
            )  # fmt: skip
        except OSError as error:
            raise PeerError(f"{words[0]}: {error.strerror}") from None
    try:
        url = f"http://127.0.0.1:{port}/v1"
        while not _answers(port, command.base):
            if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                lines = log.read_text("utf-8", "replace").strip().splitlines()
                raise PeerError(lines[-1][:300] if lines else "it ended without a word")
            time.sleep(0.05)
        yield Server(name, url, command.base, process, time.perf_counter() - began)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int, model: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    except http.client.HTTPException:
        return False
    finally:
        connection.close()
