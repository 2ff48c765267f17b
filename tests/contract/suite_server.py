"""`suite serve` as a real process, for tests of what surrounds an engine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Running:
    """The process, a client for it, and where its standard error goes."""

    process: subprocess.Popen[str]
    http: httpx.Client
    errors: Path


@contextlib.contextmanager
def suite_serve(scratch: Path, *arguments: str | Path, **environment: str) -> Iterator[Running]:
    """Ready inside the block; killed after it if it has not ended by then."""
    errors = scratch / "stderr.txt"
    command = [sys.executable, "-m", "suite.cli", "serve", "--port", "0", *map(str, arguments)]
    with errors.open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        url = next((line.split(" at ")[1].strip() for line in lines if line.startswith("ready")), None)
        assert url, errors.read_text()
        with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60, verify=False) as http:
            yield Running(process, http, errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
