"""What is compared: an artifact, how it was evaluated, and what it costs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evalsets.compare import Report
from evalsets.report import MEASURED
from suite import lineage
from suite.evidence import size
from suite.stages import Artifact
from suite.store import Store


@dataclass(frozen=True)
class Subject:
    """One artifact behind one backend, or an endpoint of which only a report is known.

    `report` is its evaluation, None where there is none; `metrics` are what that measured.
    """

    name: str
    artifact: Artifact | None
    report: Report | None
    metrics: dict[str, Any]
    backend: str = ""
    digest: str = ""

    @property
    def parity(self) -> dict[str, Any]:
        """How it compares with what it was made from; of a GGUF file what llama.cpp computes."""
        found = self.artifact.metrics if self.artifact else {}
        return dict(found.get("parity") or found.get("llamacpp", {}).get("parity", {}))

    @cached_property
    def bytes(self) -> int | None:
        """Size of the files; None where they are gone or elsewhere."""
        return size(self.artifact) if self.artifact and self.artifact.path.exists() else None

    @property
    def speed(self) -> dict[str, float]:
        """Throughput and latencies, where they were measured."""
        return dict(self.metrics.get("speed", {}))

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """What was found on each question set, as report.json has it."""
        return self.report.sets if self.report else {}

    def parents(self) -> list[str]:
        """Digests of what it was made from, nearest first."""
        return list(lineage.parents(self.artifact)) if self.artifact else []


def of_evaluation(made: Artifact, digest: str = "") -> Subject:
    """What an `eval` stage evaluated; `digest` where its record says none, as for a report of an endpoint."""
    report, record = Report.read(made.path), made.record
    asked = next(iter(record.get("inputs", {}).get("model", ())), None)
    if asked is None:
        file = made.path / MEASURED
        metrics = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        return Subject(made.path.name, None, report, metrics, digest=digest)
    artifact = Artifact(Path(asked["path"]), asked["type"], asked["digest"])
    backend = str(made.metrics.get("backend") or record.get("settings", {}).get("backend", ""))
    return Subject(asked["name"], artifact, report, made.metrics, backend, asked["digest"])


def of_artifact(artifact: Artifact, store: Store) -> list[Subject]:
    """An artifact as its newest evaluation behind each backend shows it; without any, what is known of it."""
    digest = artifact.digest or store.digest(artifact.path)
    found: dict[str, tuple[str, Subject]] = {}
    for made in store.find(""):
        asked = made.record.get("inputs", {}).get("model", ()) if made.type == "report" else ()
        if any(source["digest"] == digest for source in asked):
            subject = replace(of_evaluation(made), name=artifact.name, artifact=artifact)
            known = found.get(subject.backend)
            if known is None or made.record["made"] >= known[0]:
                found[subject.backend] = made.record["made"], subject
    return [subject for _, subject in found.values()] or [Subject(artifact.name, artifact, None, {}, digest=digest)]


def unique(subjects: Iterable[Subject]) -> list[Subject]:
    """Each evaluation once; equal names get the backend, then a number."""
    seen: dict[Any, Subject] = {}
    for subject in subjects:
        place = (subject.report.folder.resolve() if subject.report else None) or subject.digest
        seen.setdefault(place, subject)
    several = Counter(s.name for s in seen.values())
    named = [
        replace(s, name=f"{s.name} ({s.backend})") if several[s.name] > 1 and s.backend else s for s in seen.values()
    ]
    return _numbered(named)


def _numbered(subjects: Sequence[Subject]) -> list[Subject]:
    several, turn = Counter(s.name for s in subjects), Counter[str]()
    found = []
    for subject in subjects:
        turn[subject.name] += 1
        number = f" #{turn[subject.name]}" if several[subject.name] > 1 else ""
        found.append(replace(subject, name=subject.name + number))
    return found
