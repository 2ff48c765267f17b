"""The runner's side of the warm server: starts stage processes and gathers what they say."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from suite.errors import StageFailed
from suite.processes import importing


@dataclass
class Process:
    """One stage process: its event pipe, its log, and how it ended."""

    name: str
    log: Path
    events: int
    pid: int = 0
    error: dict[str, Any] | None = None
    exit: int | None = None
    closed: bool = False
    _buffer: bytes = b""

    def read(self) -> list[dict[str, Any]]:
        """Events that have arrived; marks the pipe closed at its end."""
        try:
            data = os.read(self.events, 1 << 16)
        except BlockingIOError:
            return []
        self.closed = not data
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        found = [json.loads(line) for line in lines if line]
        self.error = next((e for e in found if e["event"] == "error"), self.error)
        return found


def worker_environment(threads: int) -> dict[str, str]:
    """Settings for stage processes that libraries read at import; what the person has set wins."""
    ours = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # spinning threads made training ten times slower beside other work
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # stages work on folders; a look at a hub would only wait for its answer
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**ours, **os.environ}


@dataclass
class WorkerPool:
    """A warm server and the processes that it forked; use it as a context manager."""

    threads: int
    log: Path
    _server: subprocess.Popen[bytes] | None = None
    _connection: socket.socket | None = None
    _selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    _processes: dict[int, Process] = field(default_factory=dict)
    _buffer: bytes = b""
    _count: int = 0

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connection and self._server:
            self._connection.close()
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._selector.close()

    def _connect(self) -> socket.socket:
        """The connection to the warm server, which starts with the first stage that must run."""
        if self._connection is None:
            ours, theirs = socket.socketpair()
            # -P: a person's own serve.py, in the folder where they stand, is not our package of that name
            command = [sys.executable, "-P", "-m", "suite.worker", "--warm", str(theirs.fileno())]
            environment = {**worker_environment(self.threads), "PYTHONPATH": importing()["PYTHONPATH"]}
            with self.log.open("ab") as log:  # what libraries say while they are imported
                self._server = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            theirs.close()
            self._connection = ours
            self._selector.register(ours, selectors.EVENT_READ)
        return self._connection

    def start(self, name: str, folder: Path, preload: Sequence[str]) -> Process:
        """Start the stage of `folder`/stage.json; its output goes to `folder`/log.txt."""
        connection = self._connect()
        self._count += 1
        log = folder / "log.txt"
        stage = folder / "stage.json"
        with log.open("ab") as file:
            file.write(f"# {shlex.join([sys.executable, '-m', 'suite.worker', str(stage)])}\n".encode())
            file.flush()
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            # where the plan found the kinds of its stages
            path = [str(Path(folder).absolute()) for folder in sys.path]
            request = {"id": self._count, "stage": str(stage), "preload": list(preload), "path": path}
            try:
                socket.send_fds(connection, [json.dumps(request).encode()], [file.fileno(), writer])
            except BrokenPipeError:
                raise StageFailed(
                    "the worker server has ended", where=name, hint="run the same command again"
                ) from None
            finally:
                os.close(writer)
        process = Process(name, log, reader)
        self._processes[self._count] = process
        self._selector.register(reader, selectors.EVENT_READ, process)
        return process

    def wait(self, seconds: float) -> Iterator[tuple[Process, dict[str, Any]]]:
        """Events of all processes within `seconds`; each process's last is `{"event": "exit", "code": int}`."""
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Process):
                for event in key.data.read():
                    yield key.data, event
                if key.data.closed:
                    self._close(key.data)
            else:
                self._answers()
        for number, process in list(self._processes.items()):
            if process.exit is None:
                continue
            # what it wrote last; a process of its own that outlives it may hold the pipe open
            while not process.closed and (events := process.read()):
                for event in events:
                    yield process, event
            self._close(process)
            del self._processes[number]
            yield process, {"event": "exit", "code": process.exit}

    def _close(self, process: Process) -> None:
        if process.events >= 0:
            self._selector.unregister(process.events)
            os.close(process.events)
            process.events = -1

    def _answers(self) -> None:
        """Read what the server says: the pid of a started process, the exit code of an ended one."""
        assert self._connection is not None
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = self._connection.recv(1 << 16)
        if not data:  # the server died: so did everything that it forked
            self._selector.unregister(self._connection)
            for process in self._processes.values():
                process.exit = process.exit if process.exit is not None else 1
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            started = self._processes.get(answer["id"])
            if started and "pid" in answer:
                started.pid = answer["pid"]
            elif started:
                started.exit = answer["exit"]
