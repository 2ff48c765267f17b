"""Runs a stage of the export room as its worker would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from suite.config import ArtifactType
from suite.stages import Artifact, Job, Stage

TYPES: dict[str, ArtifactType] = {"adapter": "adapter", "calibration": "dataset", "reports": "report"}


def run(
    stage: Stage, out: Path, events: list[dict[str, Any]] | None = None, **inputs: Path | Artifact | list[Artifact]
) -> dict[str, Any]:
    """Check and run `stage` into `out` on artifacts at the given paths; returns its metrics."""
    artifacts = {
        field: given
        if isinstance(given, list)
        else [given if isinstance(given, Artifact) else Artifact(given, TYPES.get(field, "model"))]
        for field, given in inputs.items()
    }
    stage.check({field: list(found) for field, found in artifacts.items()})
    scratch = out.parent / f"{out.name}-scratch"
    out.mkdir()
    scratch.mkdir()
    heard = events if events is not None else []
    return stage.run(Job("test", artifacts, out, scratch, heard.append))
