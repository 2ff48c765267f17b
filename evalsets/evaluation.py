"""Evaluate what stands behind a URL on some question sets, and leave answers and a report.

    answers/<set>.jsonl    every question with prompt, reply, what was expected and its score, in order of id
    report.json            the figures, for `evalsets.compare` and machines
    report.md              the same for people, with what failed and what could not be read

All of them are the same bytes for the same answers: times and ports are in none.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evalsets import report
from evalsets.ask import Client, Journal, Reply
from evalsets.score import headline, requests, score
from evalsets.sets import EvalSet, Question


class Progress(Protocol):
    """Called with the questions of a set that are done, all of them, the set's name, and figures such as failed."""

    def __call__(self, step: float, total: float, what: str = "", **values: float) -> None: ...


def silent(step: float, total: float, what: str = "", **values: float) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: `sets` by name as in report.json, and how fast the endpoint was."""

    model: str
    sets: dict[str, dict[str, Any]]
    speed: dict[str, float]

    @property
    def metrics(self) -> dict[str, Any]:
        """By set: {"acc", "low", "high", "n", "failed", ...} or {"not_available": why}; and "speed"."""
        return {name: dict(found["total"]) for name, found in self.sets.items()} | {"speed": self.speed}

    @property
    def failed(self) -> int:
        """How many questions got no answer."""
        return sum(found["total"].get("failed", 0) for found in self.sets.values())


def evaluate(
    client: Client, model: str, sets: list[EvalSet], out: Path, journals: Path, *,
    limit: int | None = None, progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Ask, score and write into `out`; answers already in `journals` are used where the request is the same.

    Raises SuiteError when nothing answers, the endpoint does not know `model`, or a set cannot be read.
    """
    questions = {asked.name: asked.questions(limit) for asked in sets}
    client.check_model(model)
    (out / "answers").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    meters: list[Meter] = []
    for asked in sets:
        meter = Meter(asked.name, len(questions[asked.name]), progress)
        found[asked.name] = _one(client, model, asked, questions[asked.name], out, journals, meter)
        if asked.kind != "perplexity":  # which generates nothing
            meters.append(meter)
    report.write(out, model, found)
    return Evaluation(model, found, speed(meters))


def _one(
    client: Client, model: str, asked: EvalSet, questions: list[Question], out: Path, journals: Path, meter: Meter
) -> dict[str, Any]:
    """Everything about one set, as report.json has it."""
    about = {"kind": asked.kind, "title": asked.file.title, "digest": asked.digest, "headline": headline(asked)}
    wanted = [request for q in questions for request in requests(asked, q, model)]
    journal = Journal(journals / f"{asked.name}.jsonl")
    if asked.kind == "perplexity":
        # one by one: which texts share a batch moves the last digits of their probabilities
        client = replace(client, concurrency=1)
        probe = client.ask(wanted[:1], journal)[wanted[0].id]
        if probe.refused:
            return about | {"total": {"not_available": probe.error}, "subsets": {}, "problems": []}
    replies = client.ask(wanted, journal, meter)
    meter.ended = time.perf_counter()
    scores = score(asked, questions, replies)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in scores.rows)
    (out / "answers" / f"{asked.name}.jsonl").write_text("".join(lines), "utf-8")
    return about | {"total": scores.total, "subsets": scores.subsets, "problems": report.problems(scores.rows)}


@dataclass
class Meter:
    """Counts the replies to one set as they come, and passes on how far it is."""

    name: str
    total: int
    progress: Progress
    done: int = 0
    failed: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    def __call__(self, reply: Reply, fresh: bool) -> None:
        """Count one reply; only `fresh` ones, asked now, count for the speed."""
        self.done += 1
        self.failed += bool(reply.error)
        if fresh and not reply.error:
            self.tokens += reply.tokens
            self.latencies.append(reply.latency)
        seconds = max(time.perf_counter() - self.began, 1e-9)
        self.progress(self.done, self.total, self.name, failed=self.failed, tokens_per_s=self.tokens / seconds)


def speed(meters: list[Meter]) -> dict[str, float]:
    """Throughput and latency percentiles in seconds of the questions that were asked now; empty when none was."""
    latencies = [latency for meter in meters for latency in meter.latencies]
    if not latencies:
        return {}
    seconds = sum(meter.ended - meter.began for meter in meters)
    p50, p95 = np.quantile(latencies, [0.5, 0.95])
    return {
        "questions": len(latencies), "seconds": seconds, "questions_per_s": len(latencies) / seconds,
        "tokens_per_s": sum(meter.tokens for meter in meters) / seconds,
        "latency_p50": float(p50), "latency_p95": float(p95),
    }  # fmt: skip
