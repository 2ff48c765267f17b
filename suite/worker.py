"""The process in which a stage runs, and the warm server that forks such processes.

    python -m suite.worker STAGE.json        one stage, by hand: what the first line of its log says
    python -m suite.worker --warm FD         forks a process per request that comes over the socket FD

The warm server imports the libraries once; a fork of it starts a stage in milliseconds. It computes nothing, so that
no thread pool and no CUDA context exists before a fork. When its parent dies, it and all its children die.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from suite import __version__
from suite.errors import SuiteError
from suite.processes import die_with
from suite.stages import Artifact, Emit, Job, kind
from suite.store import Store, disk_error


def run_stage(file: Path, emit: Emit) -> int:
    """Run the stage that `file` describes and commit its artifact; returns the exit code, 0 when it is there."""
    spec = json.loads(file.read_text("utf-8"))
    try:
        _make(spec, emit)
    except SuiteError as error:
        emit({"event": "error", "message": error.message, "where": error.where, "hint": error.hint})
        return error.exit_code
    except OSError as error:
        traceback.print_exc()
        explained = disk_error(error, Path(spec["store"]))
        emit({"event": "error", "message": explained.message, "where": "", "hint": explained.hint})
        return 1
    except Exception as error:
        traceback.print_exc()
        if "No space left on device" in str(error):  # libraries wrap it in errors of their own
            full = disk_error(OSError(errno.ENOSPC, ""), Path(spec["store"]))
            emit({"event": "error", "message": full.message, "where": "", "hint": full.hint})
            return 1
        text = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        emit({"event": "error", "message": what, "where": "", "hint": "the traceback is in the log"})
        return 1
    return 0


def _make(spec: dict[str, Any], emit: Emit) -> None:
    stage = kind(spec["kind"]).model_validate(spec["settings"])
    inputs = {
        field: [Artifact(Path(a["path"]), a["type"], a["digest"]) for a in artifacts]
        for field, artifacts in spec["inputs"].items()
    }
    record = {
        "name": spec["name"], "kind": spec["kind"], "version": stage.version, "type": stage.makes(),
        "settings": spec["settings"], "inputs": spec["inputs"], "libraries": spec["libraries"],
        "suite": __version__, "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip

    def waiting() -> None:
        emit({"event": "say", "text": "another run is making this artifact; waiting for it"})

    store = Store(Path(spec["store"]))
    with store.make(spec["key"], record, work=spec["work"], force=spec["force"], waiting=waiting) as making:
        if making is None:
            return
        if any(making.out.iterdir()) or any(making.scratch.iterdir()):
            emit({"event": "say", "text": "continuing what an interrupted run left"})
        emit({"event": "began"})
        os.chdir(making.scratch)  # some libraries write logs where they stand
        pythons = {name: Path(python) for name, python in spec["pythons"].items()}
        job = Job(spec["name"], inputs, making.out, making.scratch, emit, pythons)
        making.metrics = stage.run(job)
        emit({"event": "metrics", "metrics": making.metrics})


class WarmServer:
    """Forks a process for each stage it is asked for, from an interpreter that has the libraries loaded."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.running: dict[int, int] = {}  # pid -> request number

    def serve(self) -> None:
        """Answer requests until the other side closes the socket; then end the children and return."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the runner, which decides
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            selector.register(wake_read, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj == wake_read:
                        os.read(wake_read, 4096)
                        self.reap()
                    elif not self.take():
                        self.end()
                        return

    def take(self) -> bool:
        """Read one request and fork for it; False at the end of the connection."""
        data, fds, _, _ = socket.recv_fds(self.connection, 1 << 16, 2)
        if not data:
            return False
        request = json.loads(data)
        log, events = fds
        sys.path += [folder for folder in request["path"] if folder not in sys.path]
        for module in request["preload"]:
            with contextlib.suppress(Exception):  # the stage meets the same error and reports it
                importlib.import_module(module)
        gc.freeze()  # a child that collects garbage would copy every page of the libraries
        pid = os.fork()
        if pid == 0:
            self.child(Path(request["stage"]), log, events)
        os.close(log)
        os.close(events)
        self.running[pid] = request["id"]
        self.answer({"id": request["id"], "pid": pid})
        return True

    def child(self, stage: Path, log: int, events: int) -> None:
        """Run one stage in the forked process, and leave without the parent's clean-up."""
        code = 1
        try:
            os.setsid()
            die_with(os.getppid())
            self.connection.close()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = run_stage(stage, line_writer(events))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reap(self) -> None:
        """Tell the runner about every child that has ended."""
        while self.running:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.running:
                self.answer({"id": self.running.pop(pid), "exit": os.waitstatus_to_exitcode(status)})

    def answer(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the runner is gone: the next read ends this server
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def end(self) -> None:
        for pid in self.running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)


def line_writer(descriptor: int) -> Emit:
    """Writes events as JSON lines; a reader that went away is not this stage's concern."""

    def emit(event: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(descriptor, json.dumps(event, ensure_ascii=False).encode() + b"\n")

    return emit


def _print_event(event: dict[str, Any]) -> None:
    """Events of a stage that was started by hand, for the person at the terminal."""
    if event["event"] == "progress":
        values = " ".join(f"{k}={v:.4g}" for k, v in event["values"].items())
        print(f"{event['what']} {event['step']:g}/{event['total']:g} {values}", file=sys.stderr)
    else:
        print(json.dumps(event, ensure_ascii=False), file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Entry point of `python -m suite.worker`."""
    if len(arguments) == 2 and arguments[0] == "--warm":
        die_with(os.getppid())
        with socket.socket(fileno=int(arguments[1])) as connection:
            WarmServer(connection).serve()
        return 0
    if len(arguments) == 1:
        return run_stage(Path(arguments[0]), _print_event)
    print("usage: python -m suite.worker STAGE.json", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
