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


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Makes an empty store, but with the machine's environments.

    What our engine answers to the probe, and which options an engine took, is found out once for all of them: it is kept
    by the contents of what was asked.
    """
    engines = tmp_path_factory.mktemp("engines")

    def make(folder: Path) -> Path:
        folder.mkdir()
        (folder / "envs").symlink_to(HOME / "envs")
        (folder / "engines").symlink_to(engines)
        return folder

    return make


@pytest.fixture(autouse=True)
def suite_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_home: Callable[[Path], Path]) -> Path:
    """A store for each test."""
    home = new_home(tmp_path / "suite-home")
    monkeypatch.setenv("SUITE_HOME", str(home))
    return home


def descendants(pid: int) -> list[int]:
    """The children of a process, and theirs."""
    found = [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [*found, *(grandchild for child in found for grandchild in descendants(child))]
