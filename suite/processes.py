"""Processes of other programs and interpreters: gone when the one that started them is, however it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from suite.errors import StageFailed

PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process `parent` ends, however that happens. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGKILL)


def foreign() -> dict[str, str]:
    """Our environment variables, without those that would bring our packages into another interpreter."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def importing() -> dict[str, str]:
    """Our environment variables, with which another interpreter finds our packages."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


@contextlib.contextmanager
def group(
    command: Sequence[str], stdout: int | IO[bytes], stderr: IO[bytes], variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that is not ours as the leader of a process group, all of which is gone after the block.

    It gets our environment variables, and `variables`.
    """
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        env={**foreign(), **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        preexec_fn=lambda: die_with(parent),
    )
    with process:  # which waits for its end
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def run_script(
    python: Path,
    script: Path,
    arguments: Sequence[str],
    log: Path,
    progress: Callable[[float, float, str], None] = lambda *_: None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run a script, which must import nothing of ours, in the environment of an interpreter.

    `variables` are added to its environment variables, for what belongs neither in a file nor in a command line. A line
    of its output such as `{"step": 1, "total": 4, "what": "layers"}` is progress; all else goes to `log`. Raises
    StageFailed with the log's last lines when it fails.
    """
    command = [str(python), "-I", "-u", str(script), *arguments]
    with log.open("ab") as file:
        file.write(f"# {' '.join(command)}\n".encode())
        file.flush()
        with group(command, subprocess.PIPE, file, variables) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if step := _progress_of(line):
                    progress(*step)
                else:
                    file.write(line)
                    file.flush()
            code = process.wait()
    if code:
        said = tail(log)
        raise StageFailed(f"{script.name} ended with exit code {code}; its log ends with:\n{said}", hint=f"log: {log}")


def peak_memory(pids: Iterable[int]) -> int:
    """Bytes of memory that processes had resident at most, each at its own time; 0 where the system does not say."""
    found = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text("utf-8")
            found += sum(1024 * int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE))
    return found


def _progress_of(line: bytes) -> tuple[float, float, str] | None:
    if not line.startswith(b'{"step"'):
        return None
    try:
        event = json.loads(line)
        return float(event["step"]), float(event["total"]), str(event["what"])
    except (ValueError, KeyError):
        return None


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented, for an error message."""
    text = log.read_text("utf-8", "replace").splitlines()
    return "\n".join(f"  {line[:300]}" for line in text[-lines:]) or "  (nothing)"
