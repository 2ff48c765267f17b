"""`suite serve` as a real process, for tests of what surrounds an engine."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from suite.processes import importing
from tests.namesakes import namesakes


@dataclass(frozen=True)
class Running:
    """The process, a client for it, and where its standard error goes."""

    process: subprocess.Popen[str]
    http: httpx.Client
    errors: Path


@contextlib.contextmanager
def suite_serve(scratch: Path, *arguments: str | Path, **environment: str) -> Iterator[Running]:
    """Ready inside the block; killed after it if it has not ended by then. Paths among `arguments` are absolute."""
    errors = scratch / "stderr.txt"
    # as the installed command, which does not look for packages where a person stands
    command = [sys.executable, "-P", "-m", "suite.cli", "serve", "--port", "0", *map(str, arguments)]
    here, variables = namesakes(scratch / "here"), {**importing(), **environment}
    with errors.open("w") as log:
        process = subprocess.Popen(command, cwd=here, env=variables, stdout=subprocess.PIPE, stderr=log, text=True)
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
