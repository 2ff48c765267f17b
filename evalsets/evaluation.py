"""Evaluate what stands behind a URL on some question sets, and leave answers and a report.

    answers/<set>.jsonl    every question with prompt, reply, what was expected and its score, in order of id
    report.json            the figures, for `evalsets.compare` and machines
    report.md              the same for people, with what failed and what could not be read

All of them are the same bytes for the same answers: times and ports are in none. Latencies are in the journals, to
which every answer is appended as it comes.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evalsets import report
from evalsets.ask import Client, Journal, Reply, Request, encode
from evalsets.external import harness
from evalsets.external.harness import External
from evalsets.identity import scoring
from evalsets.judge import requests as gradings
from evalsets.kinds import Row
from evalsets.score import headline, requests, row, total
from evalsets.sets import EvalSet, Question


class Progress(Protocol):
    """Called with the questions of a set that are done, all of them, the set's name, and figures such as failed."""

    def __call__(self, step: float, total: float, what: str = "", **values: float) -> None: ...


def silent(step: float, total: float, what: str = "", **values: float) -> None:
    """Report nothing."""


FIELDS = {each.name for each in fields(Reply)}


class Answers(Journal):
    """The replies to a set as they come, each with its prompt, and then how it was read and what it is worth.

    `rows` are the questions answered so far, each scored by the reply alone.
    """

    def __init__(self, path: Path, asked: EvalSet, questions: list[Question]) -> None:
        super().__init__(path)
        self.asked, self.questions = asked, {question.id: question for question in questions}
        self.rows: dict[str, Row] = {}

    def score(self, reply: Reply) -> Row:
        """The row of the question that `reply` answers."""
        found = self.rows[reply.id] = row(self.asked, self.questions[reply.id], {reply.id: reply})
        return found

    def line(self, request: Request, reply: Reply) -> dict[str, Any]:
        """All of a reply, and what was asked."""
        return {"prompt": request.body.get("messages") or request.body["prompt"], **super().line(request, reply)}

    def after(self, request: Request, reply: Reply) -> dict[str, Any] | None:
        """The score of a reply to a question; what the options' likelihoods are worth, all of them decide together."""
        if reply.id not in self.questions:
            return None
        found = self.score(reply)
        judged: Row = {name: found[name] for name in ("expected", "parsed", "score", "nll") if name in found}
        return {"id": reply.id, "digest": request.digest, **judged}

    def reply(self, line: dict[str, Any]) -> Reply:
        """The reply that left a line; how it is scored is decided anew."""
        return super().reply({name: value for name, value in line.items() if name in FIELDS})


@dataclass(frozen=True)
class Judge:
    """The model that grades replies, where it is asked, and the folder of its grades, which holds no other judge's."""

    client: Client
    model: str
    grades: Path


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: `sets` by name as in report.json, how fast the endpoint was, and how many answers were
    `kept` from an earlier run."""

    model: str
    sets: dict[str, dict[str, Any]]
    speed: dict[str, float]
    kept: int = 0

    @property
    def metrics(self) -> dict[str, Any]:
        """By set: {"acc", "low", "high", "n", "failed", ...} or {"not_available": why}; and "speed"."""
        return {name: dict(found["total"]) for name, found in self.sets.items()} | {"speed": self.speed}

    @property
    def failed(self) -> int:
        """How many questions got no answer, or not to all that was asked of them."""
        return sum(found["total"].get("failed", 0) for found in self.sets.values())


def evaluate(
    client: Client, model: str, sets: list[EvalSet | External], out: Path, journals: Path, *,
    limit: int | None = None, external: harness.Settings | None = None, judge: Judge | None = None,
    progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Ask, score and write into `out`; answers already in `journals` are used where the request is the same.

    `limit` is of each set, of another program's of each subset; `external` is for those, `judge` for sets with replies
    to grade. Raises SuiteError when nothing answers, an endpoint does not know its model, or a set cannot be read.
    """
    questions = {asked.name: asked.questions(limit) for asked in sets if isinstance(asked, EvalSet)}
    client.check_model(model)
    if judge:
        judge.client.check_model(judge.model)
    (out / "answers").mkdir(parents=True, exist_ok=True)
    asking = _Asking(client, model, out, journals, judge, progress)
    found: dict[str, dict[str, Any]] = {}
    gc.freeze()  # the questions stay: to look through them whenever memory is tidied took a twentieth of the time
    try:
        for asked in sets:
            if isinstance(asked, External):
                found[asked.name] = asking.elsewhere(asked, external or harness.Settings(), limit)
            else:
                found[asked.name] = asking.one(asked, questions[asked.name])
    finally:
        gc.unfreeze()
    found = {name: {**about, "scoring": scoring()} for name, about in found.items()}
    report.write(out, model, found)
    return Evaluation(model, found, speed(asking.meters), asking.kept)


@dataclass
class _Asking:
    """The questions of one evaluation on their way; `meters` are of what generates."""

    client: Client
    model: str
    out: Path
    journals: Path
    judge: Judge | None
    progress: Progress
    meters: list[Meter] = field(default_factory=list)
    kept: int = 0

    def one(self, asked: EvalSet, questions: list[Question]) -> dict[str, Any]:
        """Everything about one set, as report.json has it."""
        about = {"kind": asked.kind, "title": asked.file.title, "digest": asked.digest, "headline": headline(asked)}
        wanted = [requests(asked, q, self.model) for q in questions]
        journal = Answers(self.journals / f"{asked.name}.jsonl", asked, questions)
        first, options = [of[0] for of in wanted], [r for of in wanted for r in of[1:]]
        if asked.kind == "perplexity":
            # one by one: which texts share a batch moves the last digits of their probabilities
            replies = self._measured(replace(self.client, concurrency=1), first, journal, asked.name)
            if (probe := replies[_shortest(first).id]).refused:
                return about | {"total": {"not_available": probe.error}, "subsets": {}, "problems": []}
        else:
            replies = self._answers(first, journal)
            more = self._measured(self.client, options, journal, asked.name) | self._grades(asked, questions, replies)
            if more:
                journal.rows.clear()
                replies |= more
        scores = total(asked, questions, [journal.rows.get(q.id) or row(asked, q, replies) for q in questions])
        self._write(asked.name, scores.rows)
        problems = report.problems(scores.rows) + scores.remarks
        return about | {"total": scores.total, "subsets": scores.subsets, "problems": problems}

    def _answers(self, wanted: list[Request], journal: Answers) -> dict[str, Reply]:
        """The generated replies; each is scored as it comes, while others are waited for."""
        meter = Meter(journal.asked.name, len(wanted), self.progress)

        def arrived(reply: Reply, fresh: bool) -> None:
            meter(reply, fresh)
            if not fresh:
                journal.score(reply)

        replies = self.client.ask(wanted, journal, arrived)
        meter.ended = time.perf_counter()
        self.meters.append(meter)
        self.kept += meter.kept
        return replies

    def _grades(self, asked: EvalSet, questions: list[Question], replies: dict[str, Reply]) -> dict[str, Reply]:
        """A judge's replies, where the set wants them and there is one."""
        if self.judge is None or "judge" not in asked.file.metrics:
            return {}
        wanted = gradings(questions, replies, self.judge.model)
        meter = Meter(asked.name, len(wanted), self.progress)
        found = self.judge.client.ask(wanted, Journal(self.judge.grades / f"{asked.name}.judge.jsonl"), meter)
        self.kept += meter.kept
        return found

    def _measured(self, client: Client, wanted: list[Request], journal: Journal, name: str) -> dict[str, Reply]:
        """Replies to requests for log-probabilities; only one where the endpoint refuses even the shortest.

        One that answers it does give them: what it refuses after that has failed.
        """
        if not wanted:
            return {}
        first, meter = _shortest(wanted), Meter(name, len(wanted), self.progress)
        replies = client.ask([first], journal, meter)
        if not replies[first.id].refused:
            later = client.ask([request for request in wanted if request is not first], journal, meter)
            replies |= {of: replace(reply, refused=False) if reply.refused else reply for of, reply in later.items()}
        self.kept += meter.kept
        return replies

    def elsewhere(self, asked: External, settings: harness.Settings, limit: int | None) -> dict[str, Any]:
        """The same about a set of another program."""

        def progress(step: float, total: float, _: str) -> None:
            self.progress(step, total, asked.name, failed=0)

        folder = self.journals / asked.name.replace(":", "-")
        found = harness.run(harness.Run(asked, self.client, self.model, settings, limit, folder), progress)
        rows = found.pop("rows")
        self._write(asked.name, rows)
        differ = [row for row in rows if not row["error"] and row.get("second", row["parsed"]) != row["parsed"]]
        read = [
            {
                "id": row["id"],
                "what": f"{asked.harness} reads {row['parsed']}, we {row['second']}",
                "text": row["reply"],
            }
            for row in differ[: report.SHOWN]
        ]
        return found | {"problems": report.problems(rows) + read}

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        lines = (encode(row) + "\n" for row in rows)
        (self.out / "answers" / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def _shortest(wanted: list[Request]) -> Request:
    return min(wanted, key=lambda request: len(request.content))


@dataclass
class Meter:
    """Counts the replies to one set as they come, and passes on how far it is."""

    name: str
    total: int
    progress: Progress
    done: int = 0
    failed: int = 0
    kept: int = 0
    tokens: int = 0
    latencies: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0

    def __call__(self, reply: Reply, fresh: bool) -> None:
        """Count one reply; only `fresh` ones, asked now, count for the speed."""
        self.done += 1
        self.failed += bool(reply.error)
        self.kept += not fresh
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
