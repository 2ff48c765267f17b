"""Where an artifact comes from: every artifact and data file behind it, with keys, digests and settings."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from suite.stages import Artifact

MEASURED = ("rows", "left_out", "tokens", "steps", "parameters", "loss", "parity")
"""What stages measured and would measure again; how fast they were says nothing about what they made."""


@dataclass(frozen=True)
class Step:
    """One artifact of a lineage; `kind` is empty for what was not made by a stage.

    `inputs` has the digests of what it was made from by setting; `libraries` the versions it was made with.
    """

    name: str
    type: str
    digest: str
    kind: str = ""
    key: str = ""
    version: int = 0
    inputs: dict[str, list[str]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

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
    return next((step.name for step in steps[:-1] if step.type == "model" and step.kind in ("", "download")), "")


def at_hugging_face(steps: Sequence[Step]) -> str:
    """The repository at Hugging Face's hub of the model that everything began with; empty where it began elsewhere."""
    fetched = (step for step in steps if step.kind == "download" and step.type != "adapter")
    addresses = (str(step.settings.get("address", "")) for step in fetched)
    return next((a.removeprefix("hf:").partition("@")[0] for a in addresses if a.startswith("hf:")), "")


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of those of `distributions` that are installed."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _visit(artifact: Artifact, label: str, found: dict[tuple[str, str], Step]) -> None:
    record = artifact.record
    inputs = {name: entries for name, entries in record.get("inputs", {}).items() if name != "reports"}
    for entries in inputs.values():
        for entry in entries:
            parent = Artifact(Path(entry["path"]), entry["type"], entry["digest"])
            _visit(parent, str(entry.get("name") or parent.path.name), found)
    metrics = record.get("metrics", {})
    step = Step(
        name=label,
        type=artifact.type,
        digest=str(record.get("digest") or artifact.digest),
        kind=str(record.get("kind", "")),
        key=str(record.get("key", "")),
        version=int(record.get("version", 0)),
        inputs={name: [str(entry["digest"]) for entry in entries] for name, entries in inputs.items()},
        settings=_settings(record),
        libraries={**record.get("libraries", {}), **({"suite": record["suite"]} if "suite" in record else {})},
        measured={name: metrics[name] for name in MEASURED if name in metrics},
    )
    found.setdefault((step.digest, step.name), step)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how, not from what: references are in the lineage itself, by digest."""
    inputs = record.get("inputs", {})
    return {
        key: value
        for key, value in record.get("settings", {}).items()
        if key not in inputs and value is not None and not _names_a_path(value)
    }


def _names_a_path(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_names_a_path, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and Path(value).is_absolute()
