"""Answers to every row of a data file, kept row by row beside what was expected.

    FILE.jsonl           a line a row: index, line, prompt, predict, label, finish, tokens, latency, error, digest, run
    FILE.metrics.json    what was asked of whom, and how near the predictions are to the labels

A row's prompt is all of its conversation before the last turn, its label that turn. While rows are asked, a line is
appended with each answer; so a kill at any moment loses what was in flight, and the next run asks only for that. A
line is used again where what is sent is the same (`digest`), by the same model with the same settings (`run`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evalsets.ask import Client, Journal, Reply, Request, said
from evalsets.evaluation import Meter, Progress, silent, speed
from evalsets.identity import word
from evalsets.score import likeness, text_figures
from evalsets.sets import language_of
from suite.data import Conversation
from suite.errors import SuiteError

METRICS = ("rouge", "bleu", "exact")


@dataclass(frozen=True)
class Row:
    """One conversation as a question: `prompt` are its messages but the last, `label` is what that one says."""

    index: int
    line: int
    """Where it begins in the data file."""
    prompt: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    label: str

    @classmethod
    def of(cls, index: int, conversation: Conversation) -> Row:
        """Row number `index` of the data."""
        *prompt, last = map(_sendable, conversation.messages)
        return cls(index, conversation.line, prompt, conversation.tools, said(last) or "")


def _sendable(message: dict[str, Any]) -> dict[str, Any]:
    """The message in OpenAI's form, which has the arguments of tool calls as JSON text."""
    calls = [
        {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", ())
        for function in [call["function"]]
    ]
    return {**message, "tool_calls": calls} if calls else message


class Predictions(Journal):
    """A file of predictions by `model`, the identity of what is asked; `body` is a request without its messages."""

    def __init__(self, path: Path, rows: Iterable[Row], model: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.model, self.body = model, body
        self.rows = {str(row.index): row for row in rows}

    @cached_property
    def run(self) -> str:
        """One word for the model and what is asked of it."""
        return word([self.model, self.body])

    @property
    def metrics(self) -> Path:
        """Where the metrics lie."""
        return self.path.with_suffix(".metrics.json")

    def requests(self) -> list[Request]:
        """What is asked, in the data's order."""
        return [
            Request(name, "chat/completions", {**self.body, "messages": row.prompt, **_tools(row)})
            for name, row in self.rows.items()
        ]

    def line(self, request: Request, reply: Reply) -> dict[str, Any]:
        """What is kept of a reply: the names that LLaMA-Factory's generated_predictions.jsonl has, and more."""
        row = self.rows[request.id]
        return {
            "index": row.index, "line": row.line, "prompt": row.prompt, "predict": reply.text, "label": row.label,
            "finish": reply.finish, "tokens": reply.tokens, "latency": round(reply.latency, 4), "error": reply.error,
            "digest": reply.digest, "run": self.run,
        }  # fmt: skip

    def reply(self, line: dict[str, Any]) -> Reply:
        """The reply that left a line; raises ValueError for one of another run."""
        if line["run"] != self.run:
            raise ValueError("another run")
        return Reply(
            str(line["index"]), line["digest"], line["predict"], line["finish"], line["tokens"],
            latency=line["latency"], error=line["error"],
        )  # fmt: skip

    def check(self) -> None:
        """Raise SuiteError where the file holds anything but lines of this run, the last perhaps torn by a kill."""
        if self.path.is_dir():
            raise SuiteError("is a directory, expected a file", where=str(self.path))
        if not self.path.is_file():
            return
        *lines, last = self.path.read_bytes().split(b"\n")
        runs = {_run_of(line) for line in lines if line} | ({_run_of(last)} - {None})
        if None in runs:
            raise SuiteError("holds other things than predictions", where=str(self.path), hint="name another file")
        if runs - {self.run}:
            raise SuiteError(
                "holds predictions of another model, or with other settings",
                where=str(self.path),
                hint="name another file, or lose them with --overwrite",
            )

    def settle(self, replies: Mapping[str, Reply]) -> None:
        """Put one line for each row, in the data's order, in place of the file by one rename."""
        settled = self.path.with_name(self.path.name + ".settled")
        settled.unlink(missing_ok=True)
        with Predictions(settled, self.rows.values(), self.model, self.body).writing() as write:
            for request in self.requests():
                write([self.line(request, replies[request.id])])
        settled.replace(self.path)


def _tools(row: Row) -> dict[str, Any]:
    return {"tools": row.tools} if row.tools else {}


def _run_of(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["run"])
    except (ValueError, KeyError, TypeError):
        return None


def predict(client: Client, file: Predictions, progress: Progress = silent) -> dict[str, Any]:
    """Ask for what `file` lacks and compare all of it with the labels.

    Returns what is written beside it, with the "speed" of the rows asked now. Raises SuiteError where the file holds
    something else.
    """
    file.check()
    meter = Meter("predict", len(file.rows), progress)
    replies = client.ask(file.requests(), file, meter)
    meter.ended = time.perf_counter()
    file.settle(replies)
    found = {
        "model": dict(file.model), "request": dict(file.body), "run": file.run, "metrics": compare(file.rows, replies),
    }  # fmt: skip
    file.metrics.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return found | {"speed": speed([meter])}


def compare(rows: Mapping[str, Row], replies: Mapping[str, Reply]) -> dict[str, Any]:
    """ROUGE, BLEU and exact match of all predictions, those of failed rows being 0."""
    scored = []
    for name, row in rows.items():
        reply, language = replies[name], language_of(row.label)
        alike = likeness(METRICS, language, reply, row.label)
        about = {"language": language, "reply": reply.text, "expected": row.label, "score": alike["rougeL"]}
        scored.append({**about, "finish": reply.finish, "error": reply.error, **alike})
    return text_figures(METRICS, scored)
