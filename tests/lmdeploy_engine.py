"""LMDeploy for tests: the real thing where there is a GPU, elsewhere its server above the engine of `lmdeploy_stub.py`."""

from __future__ import annotations

from pathlib import Path

from suite import envs
from suite.envs import Environment

STUB = Path(__file__).with_name("lmdeploy_stub.py")
REAL = envs.device() == "cuda"


def interpreter(environment: Environment, folder: Path) -> Path:
    """What `env_python` names: an interpreter with a command `lmdeploy` beside it; `folder` does not exist yet."""
    if REAL:
        return environment.python
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{environment.python}" "$@"\n')
    python.chmod(0o755)
    (folder / "lmdeploy").symlink_to(STUB)
    return python
