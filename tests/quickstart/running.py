"""Running the installed command as a person does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command() -> str:
    """The `suite` that belongs to this interpreter."""
    found = shutil.which("suite", path=str(Path(sys.executable).parent))
    assert found, "install the package first: pip install ."
    return found


@dataclass(frozen=True)
class Quickstart:
    """A finished run."""

    seconds: float
    output: str
    run_dir: Path
    report: dict[str, Any]

    def artifact(self, stage: str) -> Path:
        return (self.run_dir / "artifacts" / stage).resolve()


def latest(home: Path, name: str) -> Path:
    return max((home / "runs" / name).iterdir(), key=lambda p: p.stat().st_mtime_ns)


def run_quickstart(suite: Run, home: Path) -> Quickstart:
    started = time.monotonic()
    done = suite("run", "examples/quickstart.toml")
    assert done.returncode == 0, done.stdout
    run_dir = latest(home, "quickstart")
    report = json.loads((run_dir / "report.json").read_text("utf-8"))
    return Quickstart(time.monotonic() - started, done.stdout, run_dir, report)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_of(home: Path, *arguments: str) -> contextlib.AbstractContextManager[str]:
    """The URL of `suite serve` with these arguments."""
    port = free_port()
    return serving(home, port, "serve", *arguments, "--port", str(port))


@contextlib.contextmanager
def serving(home: Path, port: int, *arguments: str) -> Iterator[str]:
    """`suite` with these arguments serves at `port`; on leaving it must end cleanly within 30 s of SIGTERM."""
    environment = {**os.environ, "SUITE_HOME": str(home)}
    with subprocess.Popen([command(), *arguments], cwd=ROOT, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while (
                time.monotonic() < deadline and process.poll() is None and not answers(f"http://127.0.0.1:{port}/ready")
            ):
                time.sleep(0.2)
            assert process.poll() is None
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(30)
    assert code == 0


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False
