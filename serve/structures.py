"""Which names the files of transformers' models define: it reads 2,000 of them at every import, we at the first only.

Kept in SUITE_HOME/structures, under a digest of the version, the folder and when that was changed last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from suite.store import home

Structure = dict[str | frozenset[str], Any]
"""By folder, by what is required (a set), or by module; at the end are sets of names."""
MODELS = "models"
"""The folder that is large."""


def kept(read: Callable[[str], Structure], version: str) -> Callable[[str | Path], Structure]:
    """`transformers.utils.import_utils.create_import_structure_from_path`, which reads what is new only."""

    @cache
    def structure(folder: Path) -> Structure:
        if folder.name != MODELS:
            return read(str(folder))
        digest = hashlib.sha256(f"{version} {folder} {folder.stat().st_mtime_ns}".encode()).hexdigest()[:16]
        file = home() / "structures" / f"{digest}.json"
        with contextlib.suppress(OSError, ValueError):
            known: Structure = restored(json.loads(file.read_text("utf-8")))
            return known
        found = read(str(folder))
        with contextlib.suppress(OSError):  # a home that cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(plain(found)), "utf-8")
            partial.rename(file)
        return found

    return lambda path: structure(Path(path).parent if Path(path).is_file() else Path(path))


def plain(structure: Any) -> Any:
    """As JSON can say it: a set is a list, and a dictionary one of pairs, in an object."""
    if not isinstance(structure, dict):
        return sorted(structure)
    return {"pairs": [[sorted(k) if isinstance(k, frozenset) else k, plain(v)] for k, v in structure.items()]}


def restored(said: Any) -> Any:
    """What `plain` was given."""
    if isinstance(said, list):
        return set(said)
    return {frozenset(k) if isinstance(k, list) else k: restored(v) for k, v in said["pairs"]}
