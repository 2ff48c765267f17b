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
    """An artifact as its evaluations behind each backend show it; without any, what is known of it."""
    digest = artifact.digest or store.digest(artifact.path)
    behind: dict[str, list[Subject]] = {}
    reports = [made for made in store.find("") if made.type == "report"]
    for made in sorted(reports, key=lambda made: str(made.record["made"])):
        if any(source["digest"] == digest for source in made.record.get("inputs", {}).get("model", ())):
            subject = replace(of_evaluation(made), name=artifact.name, artifact=artifact)
            behind.setdefault(subject.backend, []).append(subject)
    return [together(found) for found in behind.values()] or [Subject(artifact.name, artifact, None, {}, digest=digest)]


def together(evaluations: Sequence[Subject]) -> Subject:
    """Evaluations of one artifact, oldest first, as one: the newest, and each set where most was asked of it.

    Of a set with several versions that is the newest version's evaluation, so that a look at ten questions, or at one
    set, hides nothing.
    """
    newest = evaluations[-1]
    asked = {name: one for one in evaluations for name in one.sets}  # the last that was asked it, by set
    names = dict.fromkeys((*newest.sets, *asked))
    chosen = {name: _fullest(name, asked[name].sets[name]["digest"], evaluations) for name in names}
    sets = {name: one.sets[name] for name, one in chosen.items()}
    elsewhere = {name: one.report.folder for name, one in chosen.items() if one.report and one is not newest}
    report = replace(newest.report, sets=sets, elsewhere=elsewhere) if newest.report else None
    return replace(newest, report=report, metrics=newest.metrics | {n: dict(one["total"]) for n, one in sets.items()})


def _fullest(name: str, digest: str, evaluations: Sequence[Subject]) -> Subject:
    """The evaluation of a version of a set with the most questions, the newest of several."""

    def questions(one: Subject) -> int:
        total = one.sets[name]["total"]
        return -1 if "not_available" in total else int(total["n"])

    having = [one for one in reversed(evaluations) if name in one.sets and one.sets[name]["digest"] == digest]
    return max(having, key=questions)


def unique(subjects: Iterable[Subject]) -> list[Subject]:
    """Each evaluation once; equal names get the backend, then a number."""
    seen: dict[Any, Subject] = {}
    for subject in subjects:
        report = subject.report
        place = (report.folder.resolve(), *sorted(report.elsewhere.items())) if report else subject.digest
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
