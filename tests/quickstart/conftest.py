"""One run of the quickstart, by the installed command, shared by the tests of this folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.quickstart.running import ROOT, Quickstart, Run, command, run_quickstart


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of this folder's tests."""
    return tmp_path_factory.mktemp("quickstart") / "home"


@pytest.fixture(scope="session")
def suite(home: Path) -> Run:
    """Runs the command with that store."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"cwd": ROOT, "text": True, "timeout": 900, "stdout": subprocess.PIPE, **options}
        environment = {**os.environ, "SUITE_HOME": str(home)}
        return subprocess.run([command(), *arguments], env=environment, check=False, **options)

    return run


@pytest.fixture(scope="session")
def quickstart(suite: Run, home: Path) -> Quickstart:
    """The first run, on an empty store."""
    return run_quickstart(suite, home)
