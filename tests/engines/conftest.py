"""Libraries in environments of their own: tests use those that `suite env install NAME` has made, and skip without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from suite import envs, store
from suite.envs import Environment

HOME = store.home()  # read before each test gets a store of its own


@pytest.fixture(scope="session")
def installed() -> Callable[[str], Environment]:
    """The environment of a name, or a skipped test that says how to get it."""

    def find(name: str) -> Environment:
        found = envs.get(name)
        if not (HOME / "envs" / found.folder.name / envs.MARKER).is_file():
            pytest.skip(f"needs: suite env install {name}  ({found.cost})")
        return Environment(name, HOME / "envs", found.requirements, found.definition)

    return find


@pytest.fixture(autouse=True)
def suite_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store for each test, but with the machine's environments."""
    home = tmp_path / "suite-home"
    home.mkdir()
    (home / "envs").symlink_to(HOME / "envs")
    monkeypatch.setenv("SUITE_HOME", str(home))
    return home
