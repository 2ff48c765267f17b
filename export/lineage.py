"""Where an artifact comes from: every artifact and data file behind it, with keys, digests and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.stages import Artifact


@dataclass(frozen=True)
class Step:
    """One artifact of a lineage; `kind` is empty for what was not made by a stage."""

    name: str
    type: str
    digest: str
    kind: str = ""
    key: str = ""
    settings: dict[str, Any] | None = None
    libraries: dict[str, str] | None = None

    def as_json(self) -> dict[str, Any]:
        """The step without what is empty."""
        return {key: value for key, value in vars(self).items() if value}


def walk(artifact: Artifact, label: str = "") -> list[Step]:
    """All steps that led to `artifact`, itself last, each once; without any path of this machine."""
    found: dict[tuple[str, str], Step] = {}
    _visit(artifact, label or artifact.name, found)
    return list(found.values())


def root(steps: Sequence[Step]) -> str:
    """The name of the model that everything began with; empty where the artifact itself was made by no stage."""
    return next((step.name for step in steps[:-1] if step.type == "model" and not step.kind), "")


def _visit(artifact: Artifact, label: str, found: dict[tuple[str, str], Step]) -> None:
    record = artifact.record
    for field, entries in record.get("inputs", {}).items():
        if field != "reports":
            for entry in entries:
                parent = Artifact(Path(entry["path"]), entry["type"], entry["digest"])
                _visit(parent, str(entry.get("name") or parent.path.name), found)
    step = Step(
        name=label,
        type=artifact.type,
        digest=str(record.get("digest") or artifact.digest),
        kind=str(record.get("kind", "")),
        key=str(record.get("key", "")),
        settings=_settings(record),
        libraries=dict(record.get("libraries", {})),
    )
    found.setdefault((step.digest, step.name), step)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how, not from what: references are in the lineage itself, by digest."""
    inputs = record.get("inputs", {})
    return {
        key: value
        for key, value in record.get("settings", {}).items()
        if key not in inputs and value is not None and not (isinstance(value, str) and Path(value).is_absolute())
    }
