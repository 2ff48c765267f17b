"""Engines behind an OpenAI endpoint, each in a process of its own that never outlives the one that started it.

starting ──/ready──> ready ──SIGTERM──> draining ──> stopped
    └────────────── exits ──> failed: its last log lines are the error
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from serve.engines.guard import GONE_SECONDS
from serve.engines.process import Patience
from serve.server import listen, run
from serve.settings import Settings
from suite.errors import SuiteError, near
from suite.processes import die_with, importing
from suite.serving import Precision

BACKENDS: dict[str, str] = {
    "torch": "our own engine: any machine, base and adapters mixed in one batch",
    "vllm": "vLLM in an environment of its own: GPUs, and CPUs for tests",
    "lmdeploy": "LMDeploy in an environment of its own: GPUs; adapters are given to it when it starts",
    "llamacpp": "llama.cpp, for GGUF files",
}
"""What each backend is."""

START_SECONDS = 2 * Patience.start
"""How long a start may take: the probe's references, and then an engine, whose own end says why it is none."""
STOP_SECONDS = 10.0
ENGINES_STOP_SECONDS = Patience.stop + GONE_SECONDS + 2
"""How long engines in processes of their own may take to be gone, which is as long as their guard waits for them."""


@dataclass(frozen=True)
class Endpoint:
    """A running server: OpenAI's routes are under `url` + "/v1"; `models` are the names that requests may use."""

    url: str
    models: list[str]


class Child(Protocol):
    """A process that was started here."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def wait(self, timeout: float) -> int:
        """Its exit status; raises subprocess.TimeoutExpired."""


def check_backend(name: str) -> None:
    """Raise SuiteError for a backend that there is not. Torch-free."""
    if name not in BACKENDS:
        raise SuiteError(f"unknown backend '{name}'", hint=near(name, BACKENDS))


@contextlib.contextmanager
def endpoint(
    model: Path,
    adapters: Mapping[str, Path] | None = None,
    *,
    name: str = "base",
    backend: str = "torch",
    log: Path | None = None,
    dtype: Precision = "auto",
    **options: Any,
) -> Iterator[Endpoint]:
    """Serve a model and its adapters on a free local port for as long as the block lasts.

    The server is forked from this process where torch is imported already and no threads run, which takes a second or
    two off its start; else it is a fresh interpreter. It leads a process group of its own, which is gone after the
    block, and dies with this process should that be killed. `options` are those of `suite.serving`. Raises SuiteError
    when it cannot start, with the last lines of its log.
    """
    check_backend(backend)
    adapters = {adapter: path.resolve() for adapter, path in (adapters or {}).items()}
    settings = Settings(
        model=model.resolve(), adapters=adapters, name=name, dtype=dtype, log="off", backend=backend, **options
    )
    settings.check()
    with contextlib.ExitStack() as stack:
        output: Any = stack.enter_context(log.open("a+b") if log else tempfile.TemporaryFile())  # noqa: SIM115
        sock = listen("127.0.0.1", 0)
        port = sock.getsockname()[1]
        with sock:  # only the child listens: when it dies, connections are refused
            child = (_forked if settings.in_process and _may_fork() else _spawned)(settings, sock, output)
        stack.callback(_stop, child, STOP_SECONDS if settings.in_process else ENGINES_STOP_SECONDS)
        _await_ready(child, port, output)
        yield Endpoint(f"http://127.0.0.1:{port}", [name, *settings.adapters])


def _may_fork() -> bool:
    """Forking pays with torch imported; it is safe while no other thread, Python's or a library's, can hold a lock."""
    tasks = Path("/proc/self/task")
    return "torch" in sys.modules and threading.active_count() == 1 and tasks.is_dir() and len([*tasks.iterdir()]) == 1


class _Forked:
    """`subprocess.Popen`'s waiting for a process that `os.fork` made."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("serve", timeout)
            time.sleep(0.01)
        return status


def _forked(settings: Settings, sock: socket.socket, output: BinaryIO) -> Child:
    parent = os.getpid()
    pid = os.fork()
    return _Forked(pid) if pid else _serve_in_child(settings, sock, output, parent)


def _serve_in_child(settings: Settings, sock: socket.socket, output: BinaryIO, parent: int) -> NoReturn:
    status = 1
    try:
        os.setsid()
        die_with(parent)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # new objects: the parent's may hold text that is not ours to write
        sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        status = run(settings, sock)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _spawned(settings: Settings, sock: socket.socket, output: BinaryIO) -> Child:
    return subprocess.Popen(
        # -P: a person's own serve.py, in the folder where they stand, is not this package
        [sys.executable, "-P", "-m", "serve", settings.model_dump_json(), str(sock.fileno()), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[sock.fileno()],
        start_new_session=True,
        env={**importing(), "HF_HUB_OFFLINE": "1"},
    )


def _await_ready(child: Child, port: int, output: BinaryIO) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _is_ready(port):
        if child.poll() is not None:
            raise SuiteError("the server could not start; its log ends with:\n" + _tail(output))
        if time.monotonic() > deadline:
            raise SuiteError(f"the server was not ready after {START_SECONDS:.0f} s; its log ends:\n" + _tail(output))
        time.sleep(0.02)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _tail(output: BinaryIO, lines: int = 24) -> str:
    """Enough for the last words of a server that quotes those of its engine."""
    output.seek(0)
    text = output.read().decode("utf-8", "replace").splitlines()
    return "\n".join(f"  {line}" for line in text[-lines:]) or "  (nothing)"


def _stop(child: Child, seconds: float) -> None:
    """SIGTERM, time to end, then SIGKILL to all that is left of its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait(STOP_SECONDS)
