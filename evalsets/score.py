"""From questions and replies to scores: nothing leaves the denominator.

A failed question scores 0, a reply that names no option is wrong, a truncated one is scored as it stands; all three are
counted beside the score. How each kind is scored is in `evalsets.kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from evalsets.ask import Reply, Request
from evalsets.intervals import intervals
from evalsets.kinds import KINDS, Row
from evalsets.kinds.choice import continuations
from evalsets.kinds.kind import accuracy
from evalsets.kinds.texts import likeness, text_figures
from evalsets.sets import EvalSet, Question, contradictions

__all__ = ["Scores", "headline", "likeness", "requests", "row", "score", "text_figures", "total"]


@dataclass(frozen=True)
class Scores:
    """What a set gave: the figures of the whole, of each subset, and one row for each question, in order of id.

    `remarks` are faults of the set itself, in the form of a report's problems: {"id", "what", "text"}.
    """

    total: dict[str, Any]
    subsets: dict[str, dict[str, Any]]
    rows: list[Row]
    remarks: list[dict[str, str]] = field(default_factory=list)


def requests(asked: EvalSet, question: Question, model: str) -> list[Request]:
    """What is sent for a question: that with the question's own id first, then `ID#A` and so on for its options.

    The requests for options have the endpoint read the prompt with each option, which takes log-probabilities; one
    that gives none still answers the first.
    """
    if asked.kind == "perplexity":
        return [_echo(question.id, question.text, model)]
    options = continuations(question) if asked.file.likelihood else {}
    return [_chat(asked, question, model), *(_echo(name, prompt, model) for name, prompt in options.items())]


def _echo(name: str, prompt: str, model: str) -> Request:
    """A request for the log-probabilities of a text's tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    return Request(name, "completions", body)


def _chat(asked: EvalSet, question: Question, model: str) -> Request:
    generation = asked.file.generation
    body = {
        "model": model, "messages": list(question.messages), "max_tokens": generation.max_tokens,
        "temperature": generation.temperature, "seed": generation.seed,
    }  # fmt: skip
    if generation.stop:
        body["stop"] = generation.stop
    if question.tools:
        body["tools"] = list(question.tools)
    return Request(question.id, "chat/completions", body)


def score(asked: EvalSet, questions: list[Question], replies: Mapping[str, Reply]) -> Scores:
    """Score every question of a set; a question without a reply is a failed one."""
    return total(asked, questions, [row(asked, question, replies) for question in questions])


def row(asked: EvalSet, question: Question, replies: Mapping[str, Reply]) -> Row:
    """One question scored, by its reply and those to what else was asked of it."""
    reply = replies.get(question.id) or Reply(question.id, "", error="not asked")
    return _common(question, reply) | KINDS[asked.kind].row(asked.file, question, reply, replies)


def total(asked: EvalSet, questions: list[Question], rows: list[Row]) -> Scores:
    """The figures of scored questions."""
    kind = KINDS[asked.kind]
    subsets = sorted({r["subset"] for r in rows})
    parts = {name: [r for r in rows if r["subset"] == name] for name in subsets}
    whole = kind.figures(asked.file, rows)
    each = {name: kind.figures(asked.file, part) for name, part in parts.items()}
    if asked.kind == "choice" and "acc" in whole:
        whole["macro"] = fmean(part["acc"] for part in each.values())
        whole |= _categories(asked, rows)
    whole |= intervals(whole, headline(asked), rows)
    for name, part in parts.items():
        each[name] |= intervals(each[name], headline(asked), part)
    return Scores(whole, each, rows, _remarks(questions) if asked.kind in ("choice", "numeric") else [])


def _common(question: Question, reply: Reply) -> Row:
    prompt = list(question.messages) or question.text
    return {
        "id": question.id, "digest": question.digest, "subset": question.subset, "language": question.language,
        "prompt": prompt, "reply": reply.text, "finish": reply.finish, "tokens": reply.tokens, "error": reply.error,
    }  # fmt: skip


def _categories(asked: EvalSet, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Accuracy by category, for subjects that their publisher puts into categories."""
    names = sorted(set(asked.category.values()))
    by = {name: [r for r in rows if asked.category[r["subset"]] == name] for name in names}
    found = {name: accuracy(part) | {"n": len(part)} for name, part in by.items() if part}
    return {"categories": found} if found else {}


def _remarks(questions: list[Question]) -> list[dict[str, str]]:
    """Questions that occur twice with different answers: no model gets both right."""
    return [
        {"id": other.id, "what": "contradiction", "text": f"asks what {first.id} asks, and has another answer"}
        for first, other in contradictions(questions)
    ]


def headline(asked: EvalSet) -> str:
    """The figure that stands for a set, has the interval and decides comparisons."""
    return KINDS[asked.kind].headline(asked.file)
