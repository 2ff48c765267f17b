"""Where an artifact came from: the models before it, and the data that all of them learnt from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from suite.stages import Artifact
from suite.store import combine, hash_file, tree_files

MADE_FROM = ("model", "adapter", "base")
"""Fields of a record that hold what an artifact's weights come from, nearest first."""
LEARNT = "data"
"""The field whose files a stage learns from; calibration and held-out data are none."""


@dataclass
class TrainingData:
    """The files that an artifact learnt from, and why more may be unknown: what is gone, changed or not made here."""

    files: list[Path] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def parents(artifact: Artifact) -> Iterator[str]:
    """Digests of what an artifact was made from, nearest first: the model or adapter, then its base, and theirs."""
    direct = list(_direct(artifact))
    for made in direct:
        yield made.digest
    for made in direct:
        yield from parents(made)


def _direct(artifact: Artifact) -> Iterator[Artifact]:
    inputs = artifact.record.get("inputs", {})
    for name in MADE_FROM:
        for made in inputs.get(name, ()):
            yield Artifact(Path(made["path"]), made["type"], made["digest"])


def training_data(artifact: Artifact) -> TrainingData:
    """All that is known of what `artifact` and everything before it learnt from."""
    found = TrainingData()
    _collect(artifact, found)
    return TrainingData(list(dict.fromkeys(found.files)), list(dict.fromkeys(found.unknown)))


def _collect(artifact: Artifact, found: TrainingData) -> None:
    if not artifact.path.exists():
        found.unknown.append(f"{artifact.name} is gone")
    elif not artifact.record:
        found.unknown.append(f"{artifact.name} was not made here")
    for made in artifact.record.get("inputs", {}).get(LEARNT, ()):
        path = Path(made["path"])
        if not path.exists():
            found.unknown.append(f"{path.name} is gone")
        elif combine({f.relative_to(path).as_posix(): hash_file(f) for f in tree_files(path)}) != made["digest"]:
            found.unknown.append(f"{path.name} has changed")
        else:
            found.files.append(path)
    for made_from in _direct(artifact):
        _collect(made_from, found)
