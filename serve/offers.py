"""Adapter folders under the directories that the operator named: what is offered, and what a client may name."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path

from suite.errors import SuiteError

NAME = re.compile(r"[\w.@:/-]+")
"""Names of models and adapters."""


def offers(folders: Sequence[str], taken: Container[str] = ()) -> dict[str, Path]:
    """The adapter folders directly under `folders`, by name; nothing in them is read.

    Links are followed: they are the operator's. Raises SuiteError for a name that is `taken`, or there twice.
    """
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise SuiteError(f"no such folder: {folder}", where="--lora-dir")
        if (folder / "adapter_config.json").is_file():
            hint = f"serve it alone with --lora NAME={folder}"
            raise SuiteError(f"{folder} is itself an adapter, not a folder of adapters", where="--lora-dir", hint=hint)
        inside = sorted(f for f in folder.iterdir() if (f / "adapter_config.json").is_file())
        for adapter in (f for f in inside if NAME.fullmatch(f.name)):
            if adapter.name in found or adapter.name in taken:
                raise SuiteError(f"two adapters are named '{adapter.name}'", where=f"--lora-dir {folder}")
            found[adapter.name] = adapter.absolute()
    return found


def inside(text: str, folders: Sequence[str]) -> Path | None:
    """The folder that a client's `text` names, if it lies in one of the operator's `folders` once links are followed.

    A relative path is looked for in each of them. What cannot lie there, by its text alone, never reaches the file
    system. Raises SuiteError when it is no path into any of them; None when nothing is there.
    """
    roots = [Path(folder).absolute() for folder in folders]
    given = Path(text)
    wrong = SuiteError("the path does not lie in a folder that this server may load adapters from")
    if not text.strip() or "\0" in text or ".." in given.parts or not text.isprintable():
        raise wrong
    paths = [root / given for root in roots]  # an absolute path stays what it is
    reachable = [(path, root) for path, root in zip(paths, roots, strict=True) if path.is_relative_to(root)]
    if not reachable:
        raise wrong
    try:
        for path, root in reachable:
            found = path.resolve()
            if not found.is_relative_to(root.resolve()):
                raise wrong
            if found.is_dir():
                return found
    except (OSError, RuntimeError):  # longer than a name may be; links in a circle
        raise wrong from None
    return None
