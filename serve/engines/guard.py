"""`python -m serve.engines.guard SECONDS COMMAND...`: run a program that must not outlive the one that asked for it.

Whoever starts this holds the other end of its standard input. When that is closed, by a stop, a crash or kill -9, the
program gets SIGTERM, SECONDS to end, and then it and everything in its process group SIGKILL; also when it ends by
itself: engines leave workers behind. The exit status is the program's.

Should this itself be killed, the kernel ends the program, and whoever started this ends the rest of its session.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from suite.processes import die_with, foreign

PR_SET_CHILD_SUBREAPER = 36  # from linux/prctl.h
GONE_SECONDS = 5.0
"""How long killed processes may take to be gone: a driver may hold one."""


def end_session(leader: int) -> None:
    """SIGKILL for all that is left of the session of a guard that has ended. Linux only, as dying with a parent is."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # many end while they are looked at
            _, _, _, session, *_ = stat.read_bytes().rpartition(b") ")[2].split()
            if int(session) == leader:
                os.kill(int(stat.parent.name), signal.SIGKILL)


def main() -> int:
    """Run and watch it."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    guard = os.getpid()
    if sys.platform == "linux":  # what the program leaves behind becomes a child of this one
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = subprocess.Popen(
            command,
            env=foreign(),
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: die_with(guard),
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return 127
    # a Ctrl-C at the terminal is for the one that started this
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.read(0, 4096):  # a lock of sys.stdin would be in the way when this process ends first
            pass
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace)
        _kill_group(child.pid)

    threading.Thread(target=watch, daemon=True).start()
    status = child.wait()
    _kill_group(child.pid)
    _await_group(child.pid)
    return status if status >= 0 else 128 - status


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _await_group(leader: int) -> None:
    """Return when all of a group that was killed is gone, with its memory and its ports."""
    deadline = time.monotonic() + GONE_SECONDS
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-leader, os.WNOHANG) == (0, 0):
                time.sleep(0.005)


if __name__ == "__main__":
    raise SystemExit(main())
