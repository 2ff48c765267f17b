"""Checkpoints that are either whole or not there: the last file written into one says that it is complete."""

from __future__ import annotations

import shutil
from pathlib import Path

COMPLETE = "complete"


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, after all its other files were written."""
    (checkpoint / COMPLETE).touch()


def newest(folder: Path) -> Path | None:
    """The newest complete `checkpoint-<step>` in `folder`; torn ones are removed."""
    if not folder.is_dir():
        return None
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).is_file():
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)
