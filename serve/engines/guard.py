"""`python -m serve.engines.guard SECONDS COMMAND...`: run a program that must not outlive the one that asked for it.

Whoever starts this holds the other end of its standard input. When that is closed, by a stop, a crash or kill -9, the
program gets SIGTERM, SECONDS to end, and then it and everything in its process group SIGKILL; also when it ends by
itself: engines leave workers behind. The exit status is the program's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

from suite.processes import die_with, foreign


def main() -> int:
    """Run and watch it."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    guard = os.getpid()
    try:
        child = subprocess.Popen(
            command,
            env=foreign(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
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
    return status if status >= 0 else 128 - status


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main())
